"""Plain text from disk in chunks, and documents in pieces that are cut at line ends."""

import codecs
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from research.data.compressed_files import open_bytes
from research.data.row_readers import START, Place, Reading, line_start

# Where a chunk begins, as a byte of the file and characters behind it; and its text.
Chunks = Iterable[tuple[tuple[int, int], str]]


@dataclasses.dataclass(frozen=True)
class DocumentPiece:
    """A part of a document, of at most the size that it was cut to; never empty.

    Attributes:
      text: its characters.
      starts, ends: whether it is the first and the last of its document.
      where: `file:line`, for messages to the user.
      place: reading its file from here on begins with this piece.
    """

    text: str
    starts: bool
    ends: bool
    where: str
    place: Place = START


class UndecodableError(ValueError):
    """The byte at `offset` of the decompressed file is not UTF-8."""

    def __init__(self, offset: int):
        super().__init__(offset)
        self.offset = offset


def read_chunks(path: Path, errors: str, reading: Reading, size: int) -> Chunks:
    """The text of a file in chunks of `size` bytes, without a byte order mark.

    Args:
      path: the file, which may be compressed.
      errors: as in `bytes.decode`.
      reading: the part, which extends to line ends: it has the lines that begin in it.
        `start.at` is `[byte, characters]`, as a `Place` of `cut_pieces` has it.
      size: bytes that are decoded at a time.

    Raises:
      UndecodableError: bytes are not UTF-8, and `errors` is strict.
    """
    position, dropped = reading.start.at or (line_start(path, reading), 0)
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    with open_bytes(path, position, reading.alive) as file:
        for block in _blocks(file, position, reading.end, size):
            begun = position - len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UndecodableError(begun + error.start) from error
            if begun == 0:
                text = text.removeprefix("\ufeff")
            lost = min(dropped, len(text))
            yield (begun, lost), text[lost:]
            position, dropped = position + len(block), dropped - lost


def _blocks(file: Any, position: int, end: int | None, size: int) -> Iterator[bytes]:
    """Blocks of a file from `position` on, the last of them empty.

    They end at the file's end, or behind the first line end from byte `end - 1` on.
    """
    while block := file.read(size):
        if end is not None and position + len(block) >= end:
            cut = block.find(b"\n", max(end - 1 - position, 0)) + 1
            if cut:
                yield block[:cut]
                break
        yield block
        position += len(block)
    yield b""


def cut_pieces(
    chunks: Chunks, where: str, size: int, starts: bool = True, mark: str = ""
) -> Iterator[DocumentPiece]:
    """Cuts one document behind line ends, else behind spaces, else anywhere.

    The end of a piece depends only on the text from its start on, so cutting may start
    at any piece.

    Args:
      chunks: the text.
      where: for messages to the user.
      size: the most characters of a piece.
      starts: whether the first chunk begins the document.
      mark: no piece ends in or behind these letters, which a piece may begin with; see
        `split_at`.
    """
    rest, origin = "", (0, 0)
    for begun, chunk in chunks:
        carried, text, at = len(rest), rest + chunk, 0
        while len(text) - at > size + len(mark):
            most, least = at + size, at + len(mark)
            end = (
                text.rfind("\n", least, most) + 1
                or text.rfind(" ", least, most) + 1
                or most
            )
            if mark and (cut := text.find(mark, max(end - len(mark), at + 1))) >= 0:
                end = min(end, cut)
            place = Place([*_place(at, carried, origin, begun)])
            yield DocumentPiece(text[at:end], starts, False, where, place)
            starts, at = False, end
        origin, rest = _place(at, carried, origin, begun), text[at:]
    if rest:
        yield DocumentPiece(rest, starts, True, where, Place([*origin]))


def split_at(mark: str, pieces: Iterable[DocumentPiece]) -> Iterator[DocumentPiece]:
    """Makes a document of the text between two marks; the mark belongs to none.

    Reading may begin at any of the pieces: the `skip` of a place counts the parts of
    its piece that lie before. The pieces are those that `cut_pieces` cuts by the mark.
    """
    if not mark:
        yield from pieces
        return
    kept: DocumentPiece | None = None
    has_ended = False
    for piece in pieces:
        skip, starts = 0, piece.starts
        for text in piece.text.split(mark):
            has_ended |= starts
            if text:
                if kept:
                    yield dataclasses.replace(kept, ends=has_ended)
                place = piece.place._replace(skip=skip)
                kept = DocumentPiece(text, starts, False, piece.where, place)
                skip, has_ended = skip + 1, False
            starts = True
    if kept:
        yield dataclasses.replace(kept, ends=True)


def _place(
    at: int, carried: int, origin: tuple[int, int], begun: tuple[int, int]
) -> tuple[int, int]:
    """The place of character `at`, where the first `carried` begin at `origin`."""
    byte, characters = begun if at >= carried else origin
    return byte, characters + at - (carried if at >= carried else 0)
