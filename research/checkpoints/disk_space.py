"""Whether the checkpoints of a run fit on its disk."""

import shutil
from pathlib import Path
from typing import Any

import jax

from research.config.run_config import CheckpointConfig
from research.core.errors import UserError
from research.weights import parameter_paths


def size_of(folder: Path) -> int:
    """Bytes of all files below; of one that is being changed, about that."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def require_room(folder: Path, abstract_state: Any, config: CheckpointConfig) -> None:
    """Counts what is kept, and the one that is written before another is removed.

    Raises:
      UserError: the disk has less room than that.
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
            f"{config.keep_last}, keep_best={config.keep_best}, and one in the "
            "making): keep fewer, make room, or choose another --config.run_dir"
        )
