"""A slot decoder's programs without arrays, for devices that are not here."""

from typing import Any

import jax

from research.engine.slot_decoder import SlotDecoder


def abstract_state(decoder: SlotDecoder) -> Any:
    """Shapes and shardings of the state, in the place of its arrays."""
    empty = decoder._empty
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        jax.eval_shape(empty),
        empty.lower().compile().output_shardings,
    )
