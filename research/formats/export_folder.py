"""The folder of an export: complete under its name, or not there.

While it is written, its hidden neighbours are `.NAME.partial`, the older export as
`.NAME.replaced`, and `.NAME.partial.lock`. The system releases the lock when the
process ends, however it ends, and the next export beside it removes what a kill left.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax

from research.core.atomic_files import (
    PARTIAL,
    REPLACED,
    make_folder,
    publish_folder,
    sync,
)
from research.core.errors import UserError
from research.core.local_paths import holds_run
from research.formats.export_names import EXPORTED, EXPORTS
from research.parallel import agreement

LOCK = re.compile(rf"\.(?P<name>.+){re.escape(PARTIAL)}\.lock")


class ExportFolder:
    """A place that this command alone may write; see `claimed`.

    Attributes:
      path: as the user wrote it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._final = path.resolve()
        name = self._final.name
        self._partial = self._final.with_name(f".{name}{PARTIAL}")
        self._replaced = self._final.with_name(f".{name}{REPLACED}")
        self._lock = self._final.with_name(f".{name}{PARTIAL}.lock")

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    @contextlib.contextmanager
    def claimed(cls, path: Path) -> Iterator["ExportFolder"]:
        """Keeps other exports out of `path` within the block; every process enters it.

        An older export that a kill has left without its name gets it back.

        Raises:
          UserError: another export writes there, or no export can be there.
          OSError: the disk refuses.
        """
        _require_place(path)
        folder, leading = cls(path), jax.process_index() == 0
        missing = [x for x in folder._final.parents if not x.exists()]
        try:
            lock = agreement.together(lambda: folder._claim() if leading else None)
            try:
                yield folder
            finally:
                if leading:
                    folder._settle()
                    folder._lock.unlink(missing_ok=True)
                if lock:
                    lock.release()
        finally:
            for parent in missing if leading else ():
                with contextlib.suppress(OSError):  # It holds something by now.
                    parent.rmdir()

    @contextlib.contextmanager
    def filled(self) -> Iterator[Path]:
        """Gives the body an empty folder, which gets the name when the body has ended.

        Every process enters it; the leading one makes, renames and removes. After an
        error no part of the new folder stays, and an older one is as it was.

        Raises:
          OSError: the disk refuses.
        """
        leading = jax.process_index() == 0
        agreement.together(lambda: self._partial.mkdir() if leading else None)
        try:
            yield self._partial
            agreement.together(lambda: self._publish() if leading else None)
        finally:
            if leading:
                self._settle()

    def _claim(self) -> filelock.BaseFileLock | None:
        """Locks the folder, and removes what kills have left beside it."""
        make_folder(self._final.parent)
        lock = filelock.FileLock(self._lock, fallback_to_soft=False)
        left = self._lock.exists()  # Whoever makes the folders makes this first.
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"{self} is being written by another export: wait for it, or name "
                "another folder"
            ) from None
        except NotImplementedError:
            logging.warning(
                "export: %s lies on a file system without locks: start no second "
                "export to it meanwhile",
                self,
            )
            lock, left = None, True
        if not left:
            self._require_free()
        self._settle()
        for file in self._final.parent.glob(f".*{PARTIAL}.lock"):
            found = LOCK.fullmatch(file.name)
            if found and file != self._lock:
                ExportFolder(self._final.with_name(found["name"]))._clean_up()
        return lock

    def _require_free(self) -> None:
        """Raises UserError: something that no export has left has one of its names."""
        for folder in (self._partial, self._replaced):
            if os.path.lexists(folder):
                self._lock.unlink(missing_ok=True)
                raise UserError(
                    f"{folder} exists, and an export to {self} needs that name for a "
                    "while: move it away, or name another folder"
                )

    def _clean_up(self) -> None:
        """Removes what a killed export of this folder has left."""
        lock = filelock.FileLock(self._lock, fallback_to_soft=False)
        with contextlib.suppress(OSError, NotImplementedError), lock.acquire(timeout=0):
            self._settle()
            self._lock.unlink(missing_ok=True)

    def _publish(self) -> None:
        # The old folder leaves as a whole: no part of it may pass for a model.
        if self._final.exists():
            self._final.rename(self._replaced)
        publish_folder(self._partial, self._final)

    def _settle(self) -> None:
        """Leaves one export under its name: the new one, or else the older one."""
        if self._replaced.exists() and not os.path.lexists(self._final):
            self._replaced.rename(self._final)
            sync(self._final.parent)
        for folder in (self._replaced, self._partial):
            shutil.rmtree(folder, ignore_errors=True)


def _require_place(path: Path) -> None:
    """Raises UserError: a folder at `path` cannot be replaced as a whole."""
    final, inner = path.resolve(), path / EXPORTED
    if Path.cwd().is_relative_to(final):
        raise UserError(
            f"{path} holds the folder in which this command runs, and an export "
            f"replaces its folder as a whole: name another, such as {inner}"
        )
    if os.path.ismount(final):
        raise UserError(
            f"{path} is the root of a mounted disk, and an export replaces its folder "
            f"as a whole: name a folder on it, such as {inner}"
        )
    there = next(x for x in (final, *final.parents) if os.path.lexists(x))
    if not there.is_dir():
        raise UserError(f"{path} cannot be a folder: {there} is none; name another")
    for run in final.parents:
        inside = final.relative_to(run).parts
        own = inside == (EXPORTS,) or (len(inside) > 1 and inside[0] != EXPORTS)
        if own and holds_run(run):
            raise UserError(
                f"{path} lies among the files of a run: name a folder elsewhere, or "
                f"one in {run / EXPORTS}"
            )
