"""The size of checkpoints, and a check that they fit on the disk."""

import shutil
from pathlib import Path
from typing import Any

import jax

from research.checkpoints.stored_steps import size_of
from research.config.knob_groups import CheckpointConfig
from research.core.errors import UserError
from research.weights import parameter_paths


def require_room(folder: Path, abstract_state: Any, config: CheckpointConfig) -> None:
    """Checks that all kept checkpoints fit, and one more while it is being written.

    Args:
      folder: of the checkpoints; it may not exist yet.
      abstract_state: shapes and dtypes of one checkpoint.
      config: how many are kept.

    Raises:
      UserError: the disk has less room.
    """
    if jax.process_index() > 0:
        return
    one = parameter_paths.nbytes(abstract_state)
    count = config.keep_last + config.keep_best + 1
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free + size_of(folder)
    if one * count > free:
        raise UserError(
            f"{folder} has room for {free / 1e9:,.3f} GB and {count} checkpoints of "
            f"{one / 1e9:,.3f} GB do not fit (config.checkpoint.keep_last="
            f"{config.keep_last}, keep_best={config.keep_best}, and one that is "
            "being written): keep fewer, make room, or choose another --config.run_dir"
        )
