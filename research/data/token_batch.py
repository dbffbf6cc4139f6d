"""The batch: the contract between data and model, one type for every task.

Batches of pre-training and of instruction tuning differ only in `weights`.
"""

import dataclasses

import jax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows; every field is `[batch, seq]`.

    Attributes:
      tokens: int32 input ids.
      targets: int32, the id that should follow each input id.
      weights: float32, how much each target counts in the loss; 0 is ignored.
      segments: int32, 1, 2, ... for the documents of a row, 0 for padding.
      positions: int32, index of each token within its document.
      groups: int32, number of the category or source that each target's loss is
        reported under; the loss itself never reads it.
    """

    tokens: Array
    targets: Array
    weights: Array
    segments: Array
    positions: Array
    groups: Array
