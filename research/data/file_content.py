"""Refuses files that are not what their names say, by their first bytes."""

from pathlib import Path

from research.core.errors import UserError
from research.data.compressed_files import COMPRESSED, open_bytes

HEAD_BYTES = 512
MAGIC = {
    b"PAR1": "a parquet file",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PK\x03\x04": "a zip archive or an Excel file",
}


def refuse_other_content(path: Path, is_plain: bool) -> None:
    """Raises UserError if the file begins as one of another kind does."""
    with open(path, "rb") as file:
        heads = [file.read(HEAD_BYTES)]
    if is_plain and path.suffix in COMPRESSED and not _other_content(heads[0], False):
        with open_bytes(path) as file:
            heads.append(file.read(HEAD_BYTES))
    for number, head in enumerate(heads):
        text = is_plain and (number > 0 or path.suffix not in COMPRESSED)
        if found := _other_content(head, text):
            raise UserError(f"data file {path} is {found}")


def _other_content(head: bytes, is_text: bool) -> str:
    """The name of a kind of file and a remedy, if `head` begins such a file."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a page in HTML, such as an error page; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS and not the data; run git lfs pull"
    if not is_text:
        return ""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or 0 in (head[:1] + head[1:2]):
        return "UTF-16, not UTF-8; convert it with iconv -f UTF-16 -t UTF-8"
    for mark, kind in MAGIC.items():
        if head.startswith(mark):
            return f"{kind}, whatever its name says; rename or unpack it"
    return ""
