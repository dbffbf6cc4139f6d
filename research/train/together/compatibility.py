"""Which runs can train as one program. Imports no JAX, because launchers use it."""

from collections.abc import Iterable, Sequence

from research.config.choices import LOW_RANK
from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError

# Other optimizers mix elements: Adafactor's means and Muon's products would include the
# zeros of the padding.
PADDED_OPTIMIZERS = ("adamw", "lion")
MAY_DIFFER = frozenset(
    {
        "run_dir",
        "seed",
        *(f"lora.{x}" for x in ("rank", "alpha", "dropout", "targets")),
        *(f"lora.{x}" for x in ("rank_pattern", "alpha_pattern", "rslora", "layers")),
        *("lora.pissa_niter", "lora.eva_rho", "lora.eva_batches"),
        *(f"optim.{x}" for x in ("learning_rate", "schedule", "warmup", "decay")),
        *("optim.final", "optim.rate_pattern"),
    }
)

WHY = {
    "seed": "; in epochs, which each seed packs into its own number of steps",
    "lora.kind": f"; of the kinds of adapters, {', '.join(LOW_RANK)} are one program, "
    "and each other one has arrays of its own",
}


def check(configs: Sequence[Config]) -> None:
    """Refuses runs that cannot train as one program.

    Raises:
      UserError: it names the knob and the runs.
    """
    first = configs[0]
    if refusal := why_alone(first):
        raise UserError(refusal)
    known = shared(first)
    for config in configs:
        for path, value in shared(config).items():
            if value != known[path]:
                own, other = (flat(x)[path] for x in (first, config))
                raise UserError(
                    f"{first.run_dir} has {path}={own!r} and {config.run_dir} "
                    f"{other!r}: runs that train together may differ only in "
                    f"{', '.join(sorted(MAY_DIFFER))}{WHY.get(path, '')}"
                )
    folders = [config.run_dir for config in configs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"two runs have the run directory {folder!r}")


def shared(config: Config) -> dict[str, object]:
    """The knobs that all runs of a program must share, by path.

    Each seed packs the rows in its own way, so an epoch may be a step more or less.
    """
    alike = {"seed"} if config.epochs else set()
    knobs = {k: v for k, v in flat(config).items() if k not in MAY_DIFFER - alike}
    if config.lora.kind in LOW_RANK:
        knobs["lora.kind"] = LOW_RANK
    return knobs


def why_alone(config: Config) -> str:
    """Why a run can only train alone; empty if it can train with others."""
    required: dict[str, tuple[object, Iterable[object]]] = {
        "trainable": (config.trainable, ("lora",)),
        "lora.full": (config.lora.full, ((),)),
        "optim.name": (config.optim.name, PADDED_OPTIMIZERS),
        "optim.rollbacks": (config.optim.rollbacks, (0,)),
        "optim.stop_loss": (config.optim.stop_loss, (0.0,)),
        "eval.stop_loss": (config.eval.stop_loss, (0.0,)),
        "runtime.distributed": (config.runtime.distributed, (False,)),
        "runtime.offload_optimizer": (config.runtime.offload_optimizer, (False,)),
        "runtime.profile_from": (config.runtime.profile_from, (0,)),
    }
    for path, (value, allowed) in required.items():
        if value not in allowed:
            values = " or ".join(map(repr, allowed))
            return (
                f"config.{path} is {value!r}; runs train together only with {values}: "
                "train each with research.train"
            )
    return ""
