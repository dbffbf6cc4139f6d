"""Opens compressed files as plain bytes; the ending of the name decides how."""

import bz2
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research.core.errors import UserError

COMPRESSED = (".gz", ".bz2", ".zst")
SKIPPED_BYTES = 1 << 20


def open_bytes(
    path: Path, at: int = 0, alive: Callable[[], None] = lambda: None
) -> Any:
    """A binary stream of the decompressed bytes, chosen by the name's last ending.

    Reading from it raises OSError, EOFError or zlib.error where the file is damaged.

    Args:
      path: the file.
      at: the byte at which the stream starts. A compressed file is decompressed up to
        there.
      alive: called now and then meanwhile.
    """
    stream = _opened(path)
    if path.suffix in COMPRESSED:
        skip_bytes(stream, at, alive)
    else:
        stream.seek(at)
    return stream


def read_error(path: Path, error: Exception) -> UserError:
    """The message for an error from reading a stream of `open_bytes`."""
    remedy = ""
    if path.suffix == ".zst" and "memory" in str(error):
        remedy = (
            "; it was compressed with a window above 128 MiB: compress it again with "
            "zstd --long=27, or less"
        )
    return UserError(f"data file {path} cannot be read: {error}{remedy}")


def _opened(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix != ".zst":
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def skip_bytes(stream: Any, count: int, alive: Callable[[], None]) -> None:
    """Reads and drops bytes of a stream that may not be seekable."""
    while count > 0:
        read = len(stream.read(min(count, SKIPPED_BYTES)))
        if not read:
            return
        count -= read
        alive()


def kind_of(path: Path) -> str:
    """The ending of the file within, such as `.jsonl` for `rows.jsonl.zst`."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def file_bytes(path: Path) -> int:
    """The bytes of a file. One that is compressed can only be read as a whole: 1."""
    return 1 if path.suffix in COMPRESSED else path.stat().st_size
