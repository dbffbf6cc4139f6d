"""The inputs of matrices as a run measures them, for kinds that start from them."""

import dataclasses
from collections.abc import Collection, Mapping

import jax

from research.core.errors import UserError
from research.weights.parameter_spec import Spec

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputDirections:
    """The directions in which the inputs of one parameter's matrices vary most.

    Attributes:
      directions: `[*stack, in, k]`, columns of length 1, the largest variance first.
      shares: `[*stack, k]`, of the variance (or mean square) that each explains.
    """

    directions: Array
    shares: Array


def input_fault(kind: str, spec: Spec) -> str:
    """Why the inputs of `spec` are not measured for adapters of `kind`; or ""."""
    if "vocab" in spec.axes:
        return (
            f"{kind} starts at the inputs of layers: drop tables and heads from "
            "config.lora.targets, or choose another config.lora.kind"
        )
    if spec.stacked > 1:
        return (
            f"{kind} has no start for experts, each of which sees other tokens: drop "
            "them from config.lora.targets, or choose another config.lora.kind"
        )
    return ""


def require_inputs(
    kind: str, paths: Collection[str], inputs: Mapping[str, InputDirections]
) -> None:
    """Raises UserError: the inputs of one of `paths` have not been measured."""
    if missing := [path for path in paths if path not in inputs]:
        raise UserError(
            f"adapters of kind {kind!r} start from the inputs of {missing[0]} in the "
            "run's own first batches, and there are none: train with data, or choose "
            "another config.lora.kind"
        )
