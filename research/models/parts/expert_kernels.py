"""The grouped product of experts that suits a platform."""

import importlib.util

from research.config.choices import AUTO
from research.core.errors import UserError, look_up
from research.models.attention_kernels import KernelChoice

# By platform; on all others it is `blocked`. A CPU computes `ragged_dot` as a dense
# product with every expert, whose time and memory grow with their number.
BEST = {"tpu": "ragged_dot", "gpu": "ragged_dot", "cuda": "ragged_dot"}
# Where tokamax has kernels. On GPUs XLA pads `ragged_dot` to a dense product.
TOKAMAX = ("tpu", "gpu", "cuda")
PREFERRED = ("gpu", "cuda")


def choose_expert_kernel(kernel: str, platform: str) -> KernelChoice:
    """Picks the kernel of `representations.grouped_product` for a platform.

    Args:
      kernel: the user's choice: one of `EXPERT_KERNELS`, or `auto`.
      platform: of the devices that will run it: `tpu`, `gpu`, `cuda`, `cpu`, ...

    Raises:
      UserError: an explicit `kernel` cannot work here.
    """
    if kernel == AUTO:
        if platform in PREFERRED and _lacks_tokamax(platform) is None:
            return KernelChoice("tokamax", f"the best on {platform}")
        best = BEST.get(platform, "blocked")
        return KernelChoice(best, f"the best that is installed for {platform}")
    nothing = {"blocked": None, "ragged_dot": None}
    lacks = look_up(
        nothing | {"tokamax": _lacks_tokamax(platform)},
        kernel,
        "config.model.expert_kernel",
    )
    if lacks:
        raise UserError(
            f"expert kernel {kernel!r} cannot work here: {lacks}; use 'auto'"
        )
    return KernelChoice(kernel, "set in the config")


def _lacks_tokamax(platform: str) -> str | None:
    if platform not in TOKAMAX:
        return f"it needs a GPU or a TPU, this is {platform}"
    if importlib.util.find_spec("tokamax") is None:
        return "the package tokamax is not installed: run pip install tokamax"
    return None
