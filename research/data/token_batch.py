"""The contract between data, model and objective: one batch type for every task.

Pre-training and instruction tuning differ only in `weights`.
"""

import dataclasses

import jax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows; every array is `[batch, seq]`.

    Attributes:
      tokens: int32 input ids.
      targets: int32, the id that should follow each input id.
      weights: float32, how much each target counts in the loss; 0 is ignored.
      segments: int32, 1, 2, ... for the documents of a row, 0 for padding.
      positions: int32, index of each token within its document.
      groups: int32, the group that each target is reported under (a Dolly category);
        no gradient depends on it.
      rows_per_unit: consecutive rows that belong together, such as 2 where each pair
        of rows is a chosen and a rejected answer. No microbatch and no device gets a
        part of a unit: `parallel.mesh` refuses such a split.
    """

    tokens: Array
    targets: Array
    weights: Array
    segments: Array
    positions: Array
    groups: Array
    rows_per_unit: int = dataclasses.field(default=1, metadata={"static": True})
