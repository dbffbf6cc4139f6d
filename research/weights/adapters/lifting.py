"""Adapters for functions of parameters that are not ours: `lift`.

    specs = specs_of(params, config)              # which axes are inputs, by path
    base = flatten(params)[0]
    adapters = find_kind(config.kind).init(key, specs, config, base)
    lift(model.apply, config)(params, adapters, x)

The adapters are merged inside. So the full gradient of each weight is formed on the way
back, which costs about as much time as full fine-tuning, and still only adapters train.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError, refuse
from research.weights import parameter_paths
from research.weights.adapters.adapter_kind import Adapters
from research.weights.adapters.adapter_registry import find_kind
from research.weights.parameter_spec import Spec

Shape = tuple[int, ...]
ATTENTION = {"query", "key", "value", "out"}  # Modules of both of Flax's attentions.
VALUE = ".value"  # Ends the paths of a state of NNX.


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """How the axes of a parameter `[*stack, *in, *out]` are to be read.

    Attributes:
      n_in: number of axes that its product sums over; 0: it is no matrix.
      stacked: number of leading axes that count copies, such as the layers of `scan`.
    """

    n_in: int
    stacked: int = 0


def lift(function: Callable[..., Any], config: LoRAConfig) -> Callable[..., Any]:
    """`function(params, ...)` as `lifted(params, adapters, ...)`, for any pytree.

    Works for models that do not use `contract` (another Flax module, a plain function).
    `params` may be nested; adapters of `config.kind` are keyed by dotted path.

    Raises:
      UserError: `config` asks for what merged weights cannot do.
    """
    faults = [
        f"config.lora.{name} is {value!r}, and a lifted function {why}: leave it at "
        f"{getattr(LoRAConfig(), name)!r}"
        for name, value, why in (
            ("dropout", config.dropout, "has no inputs of adapters to drop"),
            ("full", config.full, "gets whole parameters as its own ones"),
            ("init_from", config.init_from, "gets its adapters from the caller"),
        )
        if value
    ]
    refuse(faults)

    @functools.wraps(function)
    def lifted(params: Any, adapters: Adapters, *args: Any, **kwargs: Any) -> Any:
        flat, structure = parameter_paths.flatten(params)
        merged = find_kind(config.kind).merge(flat, adapters, config)
        return function(parameter_paths.unflatten(structure, merged), *args, **kwargs)

    return lifted


def specs_of(
    params: Any,
    config: LoRAConfig,
    axes: Mapping[str, MatrixAxes] = MappingProxyType({}),
) -> dict[str, Spec]:
    """Specs of a foreign model's parameters, for `init` with `lift`.

    An array of two axes is a matrix `[in, out]`, and one named `bias` or `scale` is
    none. A bias beside a kernel with more axes tells which of them are outputs and
    which are stacked, as both share these; in Flax's attention names of modules do.

    Args:
      params: nested arrays, or their shapes.
      config: whose targets must be clear.
      axes: how to read the parameters whose path a pattern matches; the last match
        wins. It stands above all else.

    Raises:
      UserError: a pattern of `axes` matches nothing or more axes than there are, or a
        target may be read in several ways.
    """
    flat, _ = parameter_paths.flatten(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    said = parameter_paths.select(shapes, tuple(axes))
    read, unclear = {}, []
    for path, shape in shapes.items():
        found = axes[said[path]] if path in said else _axes(path, shapes)
        if found is None and parameter_paths.matches(path, config.targets):
            unclear.append(f"{path} {list(shape)}")
        found = found or MatrixAxes(0)
        if found.n_in and not found.stacked + found.n_in < len(shape):
            raise UserError(
                f"{path} has the axes {list(shape)}, and {found} leaves none for "
                "outputs"
            )
        names = [f"axis{i}" for i in range(len(shape))]
        if found.stacked:
            names[0] = "layers"  # So that `config.layers` chooses among them.
        read[path] = Spec(shape, tuple(names), found.n_in, found.stacked)
    if unclear:
        raise UserError(
            "the shape does not tell which axes are inputs, and which are stacked, of "
            f"{', '.join(unclear)}: say it with specs_of(..., axes="
            "{'PATTERN': MatrixAxes(n_in, stacked)}), or drop them from the targets"
        )
    return read


def _axes(path: str, shapes: Mapping[str, Shape]) -> MatrixAxes | None:
    """How Flax shapes this parameter; None where there are several ways, or none."""
    shape, end = shapes[path], VALUE if path.endswith(VALUE) else ""
    *module, name = path.removesuffix(VALUE).split(".")
    if len(shape) < 2 or name in ("bias", "scale"):
        return MatrixAxes(0)
    if len(shape) == 2:
        return MatrixAxes(1)
    bias = shapes.get(".".join([*module, "bias"]) + end)
    if bias is not None:
        ways = _beside(shape, bias)
        return ways[0] if len(ways) == 1 else None
    kernels = {
        other: shapes.get(".".join([*module[:-1], other, name]) + end, ())
        for other in ATTENTION
    }
    if (
        module
        and module[-1] in ATTENTION
        and {*map(len, kernels.values())} == {len(shape)}
    ):
        return MatrixAxes(2 if module[-1] == "out" else 1, len(shape) - 3)
    return None


def _beside(kernel: Shape, bias: Shape) -> list[MatrixAxes]:
    """The ways in which a bias `[*stack, *out]` fits a kernel `[*stack, *in, *out]`."""
    n_in = len(kernel) - len(bias)
    return [
        MatrixAxes(n_in, stacked)
        for stacked in range(len(bias))
        if n_in > 0 and bias == kernel[:stacked] + kernel[stacked + n_in :]
    ]
