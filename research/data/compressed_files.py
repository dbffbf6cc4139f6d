"""Opens compressed files as plain bytes; the ending of the name decides how."""

import bz2
import gzip
import io
from pathlib import Path
from typing import Any

COMPRESSED = (".gz", ".bz2", ".zst")


def open_bytes(path: Path) -> Any:
    """A binary stream of the decompressed bytes, chosen by the name's last ending.

    Reading from it raises OSError, EOFError or zlib.error where the file is damaged.
    """
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def kind_of(path: Path) -> str:
    """The ending of the file within, such as `.jsonl` for `rows.jsonl.zst`."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
