"""Findings of one process about checkpoints, made known to all processes."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(steps: list[int]) -> list[int]:
    """The `steps` of the first process; every process must call this."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.zeros(count, np.int32) if jax.process_index() else np.array(steps, "i4")
    return multihost_utils.broadcast_one_to_all(mine).tolist() if count else []


def anywhere(found: bool) -> bool:
    """Whether `found` holds in any process; every process must call this."""
    return bool(np.max(multihost_utils.process_allgather(np.array(found))))
