"""Checksums beside a checkpoint's files, written before Orbax's commit mark.

Orbax restores array data with a flipped bit and reports no error. So a `sums.json`
seals each folder of a checkpoint: it lists size and xxh3 of every file below. For a
subfolder that has a seal of its own it lists only that seal. Each process seals the
folder that it alone wrote (`ocdbt.process_N`), and the first process seals the few
remaining files, so the cost does not grow with the number of hosts. The seal is written
before the rename that commits, so a committed checkpoint without a seal is damaged.

The seal covers the step and the identity of the run, too: Orbax's commit mark holds the
first, `meta` the second. A folder that was renamed, swapped or copied from another run
counts as damaged.
"""

import asyncio
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import xxhash
from orbax.checkpoint.path import atomicity

from research.checkpoints.stored_steps import SEAL
from research.core.atomic_files import publish_folder, sync, write_whole

# Names that Orbax uses.
COMMITTED = "commit_success.txt"
MERGED = "manifest.ocdbt"
WRITTEN_BY = "ocdbt.process_"  # and the number of the process
PORTION = 1 << 22  # bytes read at a time
# Errors of files that are missing or unreadable. Any other error tells nothing about
# the bytes, and sets no checkpoint aside.
LOST = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


def checksum(path: Path) -> list[Any]:
    """`[bytes, xxh3 as hex]` of a file, read in portions."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while portion := file.read(PORTION):
            digest.update(portion)
            size += len(portion)
    return [size, digest.hexdigest()]


def seal(folder: Path) -> None:
    """Writes the `sums.json` of `folder`, after which no file below may change.

    Syncs what it seals: Orbax leaves the files that it writes from Python unsynced.
    """
    own = list(_own_files(folder))
    files = {str(file.relative_to(folder)): checksum(file) for file in own}
    folders = {x for file in own for x in file.parents if folder in x.parents}
    # Whoever wrote a seal has synced it, and the folder that it is in.
    synced = {file.parent for file in own if file.name == SEAL}
    files_left = (file for file in own if file.parent not in synced)
    for path in (*files_left, *(folders - synced)):
        sync(path)
    write_whole(folder / SEAL, json.dumps({"files": files, "sum": _sum_of(files)}))


def _own_files(folder: Path) -> Iterator[Path]:
    """Yields the files that the seal of `folder` lists, in a fixed order."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != SEAL:
            yield path
        elif path.is_dir():
            sealed = path / SEAL
            yield from [sealed] if sealed.exists() else _own_files(path)


def _sum_of(files: dict[str, list[Any]]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(files, sort_keys=True).encode())


def find_damage(
    folder: Path, index: int = 0, count: int = 1, item: str = "", run: str = ""
) -> list[str]:
    """Lists the damage to a sealed folder, one line per file; empty if it is intact.

    Args:
      folder: holds one checkpoint.
      index: the share of the files to read.
      count: the number of shares. A share has the folders that some processes wrote,
        or where there are more shares than those, a part of one. So the seals that a
        host reads do not become more with the hosts.
      item: a subfolder; only its files and the seals above it are checked. By default
        all files are.
      run: the id of the run that must have saved it; empty: any run.

    Raises:
      OSError: the files may not be read, or the system is at its limits.
    """
    problems: list[str] = []
    for path, (size, digest) in _listed(folder, folder, problems, item, index, count):
        name = path.relative_to(folder)
        try:
            actual_size, actual_digest = checksum(path)
        except OSError as error:
            if error.errno not in LOST:
                raise
            problems.append(f"{name}: {error.strerror}")
            continue
        if actual_size != size:
            problems.append(f"{name}: {actual_size:,} bytes instead of {size:,}")
        elif actual_digest != digest:
            problems.append(f"{name}: bytes have changed")
    return problems or _find_other_origin(folder, run)


def saving_run(folder: Path) -> str | None:
    """The id of the run that saved a checkpoint; empty if it had none.

    None if the part of the checkpoint that holds it is damaged or cannot be read.
    """
    try:
        if find_damage(folder, item="meta"):
            return None
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
    except OSError:
        return None
    return meta["identity"].get("run", "")


def _find_other_origin(folder: Path, run: str) -> list[str]:
    """Compares the step and the run of an intact checkpoint with the expected ones."""
    try:
        step = (folder / COMMITTED).read_text(encoding="utf-8")
        if step != folder.name:
            return [f"it holds step {step}, and its folder is named {folder.name}"]
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        if run and meta["identity"].get("run") != run:
            return ["another run has saved it"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # The share that checks this file reports the damage to it.
    return []


def _listed(
    top: Path, folder: Path, problems: list[str], item: str, index: int, count: int
) -> Iterator[tuple[Path, list[Any]]]:
    """Yields the files of a share with their checksums, as `find_damage` deals them."""
    try:
        # Damage may turn text into other bytes, and numbers into other values.
        content = json.loads((folder / SEAL).read_bytes())
        files, known = content["files"], content["sum"]
        if _sum_of(files) != known:
            raise ValueError("it does not match its own sum")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno not in LOST:
            raise
        where = (folder / SEAL).relative_to(top)
        problems.append(f"{where}: {getattr(error, 'strerror', None) or error}")
        return
    own, of_processes, others = [], [], []
    for name, sums in sorted(files.items()):
        path = folder / name
        if item and (top / item) not in path.parents:
            continue
        is_dealt = path.name == SEAL and path.parent.name.startswith(WRITTEN_BY)
        (of_processes if is_dealt else own).append((path, sums))
        if path.name == SEAL and not is_dealt:
            others.append(path.parent)
    yield from own[index::count]
    for inner in others:
        yield from _listed(top, inner, problems, item, index, count)
    for number, shares, share in dealt(len(of_processes), index, count):
        path, sums = of_processes[number]
        if share == 0:
            yield path, sums
        yield from _listed(top, path.parent, problems, item, share, shares)


def dealt(folders: int, index: int, count: int) -> Iterator[tuple[int, int, int]]:
    """The folders that share `index` of `count` reads: number, shares of it, share."""
    if not folders:
        return
    if count <= folders:
        yield from ((number, 1, 0) for number in range(index, folders, count))
        return
    share, number = divmod(index, folders)
    yield number, len(range(number, count, folders)), share


class SealedPath(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder, sealed before the rename that makes it final."""

    async def finalize(self) -> None:
        folder, final = Path(self.get()), Path(self.get_final())
        await asyncio.to_thread(_commit, folder, final)

    @classmethod
    def from_final(cls, final_path: Any, **options: Any) -> "SealedPath":
        """Overrides Orbax's constructor; it takes the same options."""
        # Orbax would write the times of start and commit after the seal.
        options["checkpoint_metadata_store"] = None
        return super().from_final(final_path, **options)


def _commit(folder: Path, final: Path) -> None:
    # The oldest Orbax that is allowed commits a step as a whole, others each item too.
    written = f"{WRITTEN_BY}*"
    for part in (*folder.glob(written), *folder.glob(f"*/{written}")):
        if not (merged := part.parent / MERGED).is_file():
            # Orbax takes it for a checkpoint without arrays, and reports success.
            raise OSError(f"{merged} is missing: the arrays were not merged")
    (folder / COMMITTED).write_text(final.name, encoding="utf-8")
    seal(folder)
    publish_folder(folder, final)


class SealedArrays(ocp.handlers.StandardCheckpointHandler):
    """Orbax's handler of array trees, which seals the files of each process."""

    def __init__(self, failed: Callable[[Exception], None] = lambda error: None):
        """`failed` is called at once with an error that Orbax raises only later."""
        super().__init__()
        self._failed = failed

    async def async_save(self, directory: Any, *args: Any, **options: Any) -> list[Any]:
        futures = await super().async_save(directory, *args, **options) or []

        def seal_own() -> None:
            path = directory if isinstance(directory, os.PathLike) else directory.path
            own = Path(path) / f"{WRITTEN_BY}{jax.process_index()}"
            if own.is_dir():
                seal(own)

        return [
            _ReportingFuture(ocp.future.ChainedFuture(futures, seal_own), self._failed)
        ]


class _ReportingFuture:
    """An Orbax future that passes the error of its result to `failed`."""

    def __init__(self, future: ocp.future.Future, failed: Callable[[Exception], None]):
        self._future = future
        self._failed = failed

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._failed(error)
            raise

    def cancel(self) -> None:
        self._future.cancel()
