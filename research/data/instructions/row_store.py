"""Tokenised rows on disk, in units of some thousand, read through a memory map.

A unit is a file of numbers and a JSON file that is written last, so a unit that has
its JSON is finished. A manifest that lists all units is written after them.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.core.atomic_files import write_whole
from research.data.instructions.packing import TokenizedDocument

MANIFEST = "manifest.json"
SIDES = ("train", "held_out")
TRAINED = np.uint32(1 << 31)  # The bit of an id that counts in the loss.
COLUMNS = 4  # Per document: ids, trained predictions, group, last id with its bit.


@dataclasses.dataclass(frozen=True)
class RowUnit:
    """The content of a unit's JSON.

    Attributes:
      side, number: its place; numbers count up within one of `SIDES`.
      where: `file:line` of each document.
      schemas: the numbers of the first documents that were read from each schema.
      ids: how many ids the documents have in all.
      sha256: of the file of numbers.
      held: the rows themselves, as JSON, if they are held out.
      dropped: how many rows have no document, by reason.
      truncated: how many documents have a shorter context than their row.
      examples: `file:line: reason` for each row that was dropped or cut.
      template_notes: those of the `ChatFormat`.
    """

    side: str
    number: int
    where: list[str]
    schemas: dict[str, list[int]]
    ids: int
    sha256: str
    held: list[dict[str, Any]]
    dropped: dict[str, int]
    truncated: int
    examples: list[str]
    template_notes: list[str]

    @property
    def size(self) -> "UnitSize":
        return UnitSize(self.side, self.number, len(self.where), self.ids)


@dataclasses.dataclass(frozen=True)
class UnitSize:
    """A unit's place, and how many documents and ids it has."""

    side: str
    number: int
    documents: int
    ids: int

    def file(self, folder: Path, ending: str) -> Path:
        return folder / f"{self.side}-{self.number:06d}.{ending}"

    def is_whole(self, folder: Path) -> bool:
        """Whether the file of numbers has the stated size."""
        try:
            size = self.file(folder, "u32").stat().st_size
        except OSError:
            return False
        return size == 4 * (COLUMNS * self.documents + self.ids)


class StoredDocuments(Sequence[TokenizedDocument]):
    """The documents of one side, each read when it is needed."""

    def __init__(self, folder: Path, sizes: Sequence[UnitSize]):
        """Maps the units, and reads the table of documents of each."""
        self._folder = folder
        self._sizes = [size for size in sizes if size.documents]
        self._maps = [
            np.memmap(size.file(folder, "u32"), np.dtype("<u4"), "r")
            for size in self._sizes
        ]
        counts = [size.documents for size in self._sizes]
        self._first = [0, *itertools.accumulate(counts)]
        tables = [
            np.array(ids[: COLUMNS * count]).reshape(count, COLUMNS)
            for ids, count in zip(self._maps, counts, strict=True)
        ]
        empty = np.zeros((0, COLUMNS), np.uint32)
        self._table = np.concatenate([empty, *tables])
        # Ends of the documents among the numbers of their unit.
        ends = [np.cumsum(t[:, 0], dtype=np.int64) + t.size for t in tables]
        self._ends = np.concatenate([np.zeros(0, np.int64), *ends])
        self._unit = functools.lru_cache(4)(self._read_unit)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> TokenizedDocument:
        if not 0 <= index < len(self):
            raise IndexError(index)
        unit = bisect.bisect_right(self._first, index) - 1
        end = int(self._ends[index])
        marked = self._maps[unit][end - int(self._table[index, 0]) : end]
        return TokenizedDocument(
            (marked & ~TRAINED).astype(np.int32),
            marked >= TRAINED,
            int(self._table[index, 2]),
        )

    @property
    def slots(self) -> np.ndarray:
        """int64 `[documents]`: `TokenizedDocument.slots` of each."""
        return self._table[:, 0].astype(np.int64) - 1

    @property
    def trained(self) -> int:
        """Predictions that count in the loss."""
        return int(self._table[:, 1].sum(dtype=np.int64))

    def count_ends(self, stop_ids: frozenset[int]) -> int:
        """Documents whose last prediction is a trained stop id."""
        last = self._table[:, 3]
        return int((np.isin(last & ~TRAINED, list(stop_ids)) & (last >= TRAINED)).sum())

    def where(self, index: int) -> str:
        """`file:line` of a document's row."""
        unit = bisect.bisect_right(self._first, index) - 1
        return self._unit(unit)[index - self._first[unit]]

    def _read_unit(self, unit: int) -> list[str]:
        file = self._sizes[unit].file(self._folder, "json")
        return json.loads(file.read_text(encoding="utf-8"))["where"]


def pack_numbers(documents: Sequence[TokenizedDocument]) -> bytes:
    """The file of a unit: a table of its documents, then their ids one after another.

    Little-endian uint32 `[documents, COLUMNS]` and `[ids]`.
    """
    marked = [d.ids.astype(np.uint32) | (d.trained * TRAINED) for d in documents]
    table = np.array(
        [
            (len(ids), int(d.trained[1:].sum()), d.group, ids[-1])
            for ids, d in zip(marked, documents, strict=True)
        ],
        "<u4",
    )
    return b"".join((table.tobytes(), *(ids.astype("<u4").tobytes() for ids in marked)))


def write_unit(folder: Path, unit: RowUnit, numbers: bytes) -> None:
    """Raises OSError: no space or no permission."""
    write_whole(unit.size.file(folder, "u32"), numbers)
    text = json.dumps(dataclasses.asdict(unit))
    write_whole(unit.size.file(folder, "json"), text)


def read_unit(folder: Path, side: str, number: int) -> RowUnit | None:
    """A finished unit with the numbers that were written, or None."""
    place = UnitSize(side, number, 0, 0)
    try:
        text = place.file(folder, "json").read_text(encoding="utf-8")
        unit = RowUnit(**json.loads(text))
        with open(place.file(folder, "u32"), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, TypeError):
        return None
    return unit if found == unit.sha256 and unit.size.is_whole(folder) else None


def read_manifest(folder: Path, key: str) -> dict[str, Any] | None:
    """The values that `write_manifest` wrote, if all units still have their size."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = [UnitSize(*size) for size in values["units"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if values["key"] != key:
        return None
    for size in sizes:
        if not size.is_whole(folder):
            logging.warning(
                "data: %s in %s is damaged and made again",
                size.file(folder, "u32").name, folder,
            )  # fmt: skip
            return None
    return {**values, "units": sizes}


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Raises OSError: no space or no permission."""
    sizes = [dataclasses.astuple(size) for size in values["units"]]
    write_whole(folder / MANIFEST, json.dumps({**values, "units": sizes}))
