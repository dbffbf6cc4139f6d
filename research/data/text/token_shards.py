"""The files of a tokenised source: shards, and a manifest that lists them.

A shard is one part of a source: a file of training ids, a file of held-out ids, and a
JSON file that is written last and states the size of both. A shard that has its JSON is
finished, so a writer may be killed at any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.core.atomic_files import write_whole
from research.data.dropped_documents import DroppedDocuments

MANIFEST = "manifest.json"
SIDES = ("train", "held")


@dataclasses.dataclass(frozen=True)
class TextTotals:
    """Counts of documents, of ids with their marks, and of bytes of UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "TextTotals") -> "TextTotals":
        return TextTotals(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
        )


@dataclasses.dataclass(frozen=True)
class TokenShard:
    """The content of a shard's JSON.

    Attributes:
      unit, number: its place in the source; numbers count up within a unit.
      pieces: the number of pieces of text in it.
      train, held: totals of each side; a document counts where it starts.
      held_lengths: bytes of each held-out document, in order.
      held_continues: whether the first of these began in the shard before.
      sha256: of the ids of each side.
      last: whether the unit ends here.
      left_out, named: in the last shard, dropped documents of the unit by reason, as
        `DroppedDocuments` has them. Shards of older versions name none.
    """

    unit: int
    number: int
    pieces: int
    train: TextTotals
    held: TextTotals
    held_lengths: list[int]
    held_continues: bool
    sha256: list[str]
    last: bool
    left_out: dict[str, int]
    named: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"u{self.unit:06d}-s{self.number:06d}"

    def file(self, folder: Path, side: str, dtype: str) -> Path:
        """The file with the ids of one of `SIDES`, one behind the other."""
        return folder / f"{self.name}.{side}.{'u16' if dtype == '<u2' else 'u32'}"

    def totals(self, side: str) -> TextTotals:
        return self.train if side == "train" else self.held

    def is_whole(self, folder: Path, dtype: str) -> bool:
        """Whether both files have the stated size."""
        width = np.dtype(dtype).itemsize
        try:
            return all(
                self.file(folder, side, dtype).stat().st_size
                == self.totals(side).tokens * width
                for side in SIDES
            )
        except OSError:
            return False


def read_shard(folder: Path, unit: int, number: int, dtype: str) -> TokenShard | None:
    """A finished shard, or None."""
    try:
        text = (folder / f"u{unit:06d}-s{number:06d}.json").read_text(encoding="utf-8")
        shard = _from_dict(json.loads(text))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return shard if shard.is_whole(folder, dtype) else None


def write_shard(
    folder: Path, shard: TokenShard, ids: Sequence[bytes | bytearray], dtype: str
) -> None:
    """Writes the ids of both sides, then the JSON.

    Raises:
      OSError: no space or no permission.
    """
    for side, data in zip(SIDES, ids, strict=True):
        write_whole(shard.file(folder, side, dtype), data)
    text = json.dumps(dataclasses.asdict(shard))
    write_whole(folder / f"{shard.name}.json", text)


def _from_dict(values: dict[str, Any]) -> TokenShard:
    sides = {side: TextTotals(**values[side]) for side in SIDES}
    return TokenShard(**{**values, **sides})


@dataclasses.dataclass(frozen=True)
class TokenManifest:
    """All shards of a finished source.

    Attributes:
      key: `source_key` of the text, the tokenizer and the settings.
      dtype: type of the ids.
      shards: the shards in the order of the text. They name no dropped documents: a
        large source has many shards, and every process holds this manifest.
      named: the first dropped documents of the source, as in `DroppedDocuments`.
    """

    key: str
    dtype: str
    shards: list[TokenShard]
    named: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def total(self, side: str) -> TextTotals:
        return sum((shard.totals(side) for shard in self.shards), TextTotals())

    def dropped(self) -> DroppedDocuments:
        dropped = DroppedDocuments()
        for shard in self.shards:
            dropped.include(shard.left_out, {})
        dropped.include({}, self.named)
        return dropped

    def held_lengths(self) -> list[int]:
        """Bytes of every held-out document, in the order of the held-out stream."""
        lengths: list[int] = []
        for shard in self.shards:
            own = shard.held_lengths
            if shard.held_continues:
                lengths[-1] += own[0]
                own = own[1:]
            lengths += own
        return lengths

    @property
    def sha256(self) -> str:
        """sha256 of the ids; equal for equal ids, however they are split into units."""
        hashes = "".join(digest for shard in self.shards for digest in shard.sha256)
        return hashlib.sha256(hashes.encode()).hexdigest()


def read_manifest(folder: Path, key: str) -> TokenManifest | None:
    """The manifest of a finished source whose files all have the right size, or None.

    If a file is damaged, this removes the manifest and the shard's JSON, so that only
    this shard is made again.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shards = [_from_dict(shard) for shard in values["shards"]]
        named = values.get("named", {})
        manifest = TokenManifest(values["key"], values["dtype"], shards, named)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if manifest.key != key:
        return None
    damaged = [s for s in manifest.shards if not s.is_whole(folder, manifest.dtype)]
    for shard in damaged:
        logging.warning("text: %s in %s is damaged and made again", shard.name, folder)
        (folder / f"{shard.name}.json").unlink(missing_ok=True)
    if damaged:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return None
    return manifest


def write_manifest(folder: Path, manifest: TokenManifest) -> None:
    """Raises OSError: no space or no permission."""
    write_whole(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest)))
