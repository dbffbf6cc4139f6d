"""A folder of an export: complete under its name, or not there."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from research.core.atomic_files import (
    PARTIAL,
    REPLACED,
    make_folder,
    publish_folder,
)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives the body a folder that gets the name `folder` when the body has ended.

    Every process enters it; the leading one makes, renames and removes. An older
    `folder` is replaced at the end. After an error no part of the new one stays, and
    the older one is as it was.

    Raises:
      OSError: the disk refuses.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    if jax.process_index() > 0:
        yield partial
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make_folder(partial)
        yield partial
        _publish(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + REPLACED)
    # The old folder leaves as a whole: no part of it may pass for a model.
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    publish_folder(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)
