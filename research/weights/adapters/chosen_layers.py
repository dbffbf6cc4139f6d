"""Adapters in some layers alone: `config.lora.layers`."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.weights.parameter_spec import Spec

Array = jax.Array


def chosen_layers(
    layers: str, targets: Collection[str], specs: Mapping[str, Spec]
) -> tuple[int, ...]:
    """The numbers that `config.lora.layers` names, rising; empty: all layers.

    Raises:
      UserError: it has another form, names a layer that the model does not have, or no
        matrix of a layer is among `targets`.
    """
    if not layers:
        return ()
    counts = {path: spec.shape[0] for path, spec in specs.items() if _is_layered(spec)}
    if not counts.keys() & set(targets):
        raise UserError(
            f"config.lora.layers is {layers!r}, and no matrix with an adapter lies in "
            f"a layer ({', '.join(targets) or 'there are none'}): name one in "
            "config.lora.targets, or drop config.lora.layers"
        )
    count, found = max(counts.values()), set()
    for part in map(str.strip, layers.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(
                f"config.lora.layers is {layers!r}; give numbers and ranges, such as "
                "0-11 or 0-3,8"
            )
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] >= count:
            raise UserError(
                f"config.lora.layers has {part}, and the layers of this model are 0 to "
                f"{count - 1}"
            )
        found.update(numbers)
    return tuple(sorted(found))


def _is_layered(spec: Spec) -> bool:
    return spec.axes[:1] == ("layers",)


def in_layers(specs: dict[str, Spec], chosen: tuple[int, ...]) -> dict[str, Spec]:
    """`specs` of one matrix, which has an adapter in the `chosen` layers alone."""
    return {
        name: dataclasses.replace(x, layers=chosen) if _is_layered(x) else x
        for name, x in specs.items()
    }


def only_layers(value: Array, layers: Sequence[int]) -> Array:
    """Zeros in the other layers, where no adapter is; see `AdapterKind`."""
    if not layers:
        return value
    kept = jnp.zeros(value.shape[0], bool).at[jnp.array(layers)].set(True)
    return jnp.where(jnp.expand_dims(kept, range(1, value.ndim)), value, 0)
