"""The instruction dataset: rows tokenised, split, packed and ordered for training."""

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from research.config.data_knobs import DataConfig, TextConfig
from research.config.field_names import shell_flag
from research.core.errors import UserError
from research.data.batch_order import OrderedBatches, endless
from research.data.instructions.packing import build_batch, pack
from research.data.instructions.row_cache import OF_SCHEMA, UnitBuild, open_folder
from research.data.instructions.row_selection import (
    LoadedRows,
    RowMark,
    RowSource,
    draw,
    find_rows,
    held_out_count,
    load_rows,
)
from research.data.instructions.row_store import (
    SIDES,
    StoredDocuments,
    write_manifest,
)
from research.data.instructions.unused_columns import UnusedFacts
from research.data.row_readers import BadRowError, Row
from research.data.token_batch import Batch
from research.tokenize.chat_template import ChatFormat
from research.tokenize.conversation import Record

# Categories whose losses are reported, at most; of more, the rare ones are one.
MOST_CATEGORIES, RARE = 64, 0.01
OTHERS = "(other)"


# Rows that are measured, and the step of the length that is proposed, where none fits.
MEASURED, SEQ_LEN_STEP = 256, 64
SAMPLED = 1000  # rows whose texts are kept, to compare them with their ids


@dataclasses.dataclass(frozen=True)
class PackedDocuments:
    """The packed documents of one side, training or held out.

    Attributes:
      documents: the tokenised records.
      rows: indices of the documents that share each row.
      seq_len: positions of a row.
    """

    documents: StoredDocuments
    rows: list[list[int]]
    seq_len: int

    @classmethod
    def of(
        cls, documents: StoredDocuments, seq_len: int, seed: int
    ) -> "PackedDocuments":
        return cls(documents, pack(documents.slots, seq_len, seed), seq_len)

    def only(self, documents: np.ndarray, seed: int) -> "PackedDocuments":
        """Some of the documents, packed anew; `documents` are their numbers."""
        packed = pack(self.documents.slots[documents], self.seq_len, seed)
        rows = [[int(documents[i]) for i in row] for row in packed]
        return dataclasses.replace(self, rows=rows)

    @property
    def real_tokens(self) -> int:
        return int(self.documents.slots.sum())

    @property
    def trained_tokens(self) -> int:
        return self.documents.trained

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.real_tokens / (len(self.rows) * self.seq_len)

    def batch(self, rows: list[list[int]]) -> Batch:
        return build_batch(rows, self.documents, self.seq_len)


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """The facts about the rows of a data set that people and programs ask for.

    Attributes:
      sha256: of the raw rows' text, to tell one data set from another.
      total: how many rows are usable.
      categories: how many of them are in each group.
      schemas: how many of them were read from which columns.
      notes: how many values or rows each remark holds of.
      unused: facts about the columns that are filled and not used, by name.
      dropped: how many rows were dropped, by reason.
      truncated: how many rows were kept with a shorter context.
      copies: how many rows have the same texts as a row before them.
    """

    sha256: str
    total: int
    categories: dict[str, int]
    schemas: dict[str, int]
    notes: dict[str, int]
    unused: UnusedFacts
    dropped: dict[str, int]
    truncated: int
    copies: int


@dataclasses.dataclass(frozen=True)
class InstructionDataset:
    """Both sides of the rows, and the rows that were dropped.

    Attributes:
      origin: the file or dataset, for people.
      counts: of the rows as they were read.
      categories: the groups; `TokenizedDocument.group` numbers them.
      train, held_out: the packed sides.
      of_schema: the numbers of some training documents of each schema.
      held_out_records: the held-out rows as text, for prompts.
      sample: rows as text from all over the data, at most `SAMPLED`.
      examples: `file:line: reason` for each row that was dropped or cut.
      held_out_examples: those of them that are known to be of the held-out side.
    """

    origin: str
    counts: RowCounts
    categories: list[str]
    train: PackedDocuments
    held_out: PackedDocuments
    of_schema: dict[str, list[int]]
    held_out_records: list[Record]
    sample: list[Record]
    examples: list[str]
    held_out_examples: list[str]


def load_dataset(
    config: DataConfig,
    seed: int,
    chat_format: ChatFormat,
    text: TextConfig,
    knob: str = "config.data.path",
    is_test: bool = False,
) -> InstructionDataset:
    """Reads, splits and tokenises the rows of `config` once; packs them by `seed`.

    Args:
      config: of the rows.
      seed: of the packing.
      chat_format: how a row becomes ids.
      text: names the folder of tokenised rows.
      knob: the one that the user gave the path of the rows by.
      is_test: the rows are for a test, see `to_record`. Those without an answer have
        no document, and all rows may be such.

    Raises:
      UserError: the data cannot be read, or nothing is left to train on.
    """
    sources = [dataclasses.replace(find_rows(config, knob), is_test=is_test)]
    if config.eval_path:
        own = dataclasses.replace(config, path=config.eval_path)
        held_out = find_rows(own, "config.data.eval_path")
        sources.append(_told_apart(held_out, sources[0]))

    def build(folder: Path, key: str) -> None:
        _build(folder, key, sources, config, seed, chat_format)

    folder, manifest = open_folder(sources, config, seed, chat_format, text, build)
    counts = RowCounts(**manifest["counts"])
    for note, count in counts.notes.items():
        logging.warning("data: %s (%d times)", note, count)
    for note in manifest["template_notes"]:
        chat_format.say(note)
    origin = sources[0].origin
    logging.info("data: %s, %d rows, sha256 %s", origin, counts.total, counts.sha256)
    train, held_out = (
        PackedDocuments.of(
            StoredDocuments(folder, [s for s in manifest["units"] if s.side == side]),
            config.seq_len,
            seed,
        )
        for side in SIDES
    )
    return InstructionDataset(
        origin=origin,
        counts=counts,
        categories=manifest["categories"],
        train=train,
        held_out=held_out,
        of_schema=manifest["of_schema"],
        held_out_records=[Record.from_json(r) for r in manifest["held_out"]],
        sample=[Record.from_json(r) for r in manifest["sample"]],
        examples=manifest["examples"],
        held_out_examples=manifest["held_out_examples"],
    )


def _build(
    folder: Path,
    key: str,
    sources: Sequence[RowSource],
    config: DataConfig,
    seed: int,
    chat_format: ChatFormat,
) -> None:
    """Tokenises the rows into the units of a folder, and writes its manifest."""
    rows = held_rows = load_rows(config, seed, sources[0])
    dropped: collections.Counter[str] = collections.Counter(rows.dropped)
    examples, sha256 = list(rows.examples), rows.sha256
    if config.eval_path:
        held_rows = load_rows(dataclasses.replace(config, max_rows=0), seed, sources[1])
        held, rest = held_rows.marks, _without(rows, held_rows, dropped, examples)
        dropped.update(held_rows.dropped)
        examples += held_rows.examples
        digests = f"{rows.sha256} {held_rows.sha256}".encode()
        sha256 = hashlib.sha256(digests).hexdigest()
    else:
        held, rest = draw(rows.marks, held_out_count(config, rows.marks), config, seed)
    group_of = _group_categories([mark.category for mark in held + rest])
    sampled = {x.where for x in rows.marks[:: -(-len(rows.marks) // SAMPLED)]}
    work = UnitBuild(folder, config, chat_format, group_of, sampled)
    work.held_examples += held_rows.examples if config.eval_path else []
    units, held_out, truncated = [], [], 0
    readers = {"train": rows.records(rest), "held_out": held_rows.records(held)}
    if not held:
        del readers["held_out"]
    for side, records in readers.items():
        for unit in work.run(side, records):
            units.append(unit.size)
            held_out += unit.held
            dropped.update(unit.dropped)
            truncated += unit.truncated
            examples += unit.examples
        documents = sum(size.documents for size in units if size.side == side)
        if not documents and not work.prompts:
            of, marks = (rows, rest) if side == "train" else (held_rows, held)
            name = side if len(readers) > 1 else ""
            raise _all_too_long(name, of, marks, chat_format)
    grouped = collections.Counter(group_of.get(m.category, OTHERS) for m in rows.marks)
    copies = len(held) + len(rest) - len({mark.key for mark in held + rest})
    counts = RowCounts(
        sha256, len(rows.marks), dict(sorted(grouped.items())), rows.schemas,
        rows.notes, rows.unused, dict(dropped), truncated, copies,
    )  # fmt: skip
    parts = {
        "key": key,
        "units": units,
        "counts": dataclasses.asdict(counts),
        "categories": sorted(set(group_of.values())),
        "template_notes": chat_format.notes,
        "of_schema": {k: found[:OF_SCHEMA] for k, found in work.of_schema.items()},
        "held_out": held_out,
        "sample": [dataclasses.asdict(record) for record in work.sample],
        "examples": examples,
        "held_out_examples": work.held_examples,
    }
    write_manifest(folder, parts)


def _all_too_long(
    side: str, rows: LoadedRows, marks: list[RowMark], chat_format: ChatFormat
) -> UserError:
    """Names the length that keeps the first `MEASURED` of these rows whole."""
    first = list(rows.records(marks[:MEASURED]))
    encodings = chat_format.encode_each(first)
    ids = [len(x.ids) for x in encodings if not isinstance(x, UserError)]
    longest = max(ids, default=1) - 1  # n positions predict n ids of n + 1.
    flag = shell_flag("data.seq_len", -(-longest // SEQ_LEN_STEP) * SEQ_LEN_STEP)
    of = "" if len(first) == len(marks) else f" of the first {len(first)}"
    what = {"train": "training row", "held_out": "held-out row"}.get(side, "row")
    return UserError(
        f"every {what} of {rows.source.origin} is longer than config.data.seq_len="
        f"{rows.config.seq_len} tokens; the longest{of} has {longest:,}: set {flag} "
        "for a new run, or give shorter rows"
    )


def _told_apart(held: RowSource, rows: RowSource) -> RowSource:
    """`held`, with `eval_path ` before its places if `rows` has files of the names."""
    names = {name for name, _ in rows.named_files()} if rows.files else set()
    if not held.files or names.isdisjoint(name for name, _ in held.named_files()):
        return held

    def read() -> Iterator[tuple[str, Row | BadRowError]]:
        for where, row in held.read():
            there = f"eval_path {where}"
            if isinstance(row, BadRowError):
                row = BadRowError(row.reason, there, row.detail)
            yield there, row

    return dataclasses.replace(held, read=read)


def _without(
    rows: LoadedRows,
    held: LoadedRows,
    dropped: collections.Counter[str],
    examples: list[str],
) -> list[RowMark]:
    """The rows that are not held out as well.

    Raises:
      UserError: there are none.
    """
    keys = {mark.key for mark in held.marks}
    kept = []
    for mark in rows.marks:
        if mark.key in keys:
            dropped["held out as well"] += 1
            examples.append(f"{mark.where}: a row of config.data.eval_path equals it")
        else:
            kept.append(mark)
    if not kept:
        raise UserError(
            f"every row of {rows.source.origin} is in {held.source.origin} as well, so "
            "none is left to train on; give other rows as config.data.eval_path"
        )
    return kept


def _group_categories(categories: list[str]) -> dict[str, str]:
    """The group under which the loss of each category is reported.

    A column of thousands of values, such as names of documents, is no category.
    """
    counts = collections.Counter(categories)
    if len(counts) <= MOST_CATEGORIES:
        return {name: name for name in counts}
    frequent = {
        name
        for name, count in counts.most_common(MOST_CATEGORIES - 1)
        if count >= RARE * len(categories)
    }
    logging.warning(
        "data: there are %d categories; the losses of %d are reported, and of all "
        "others together",
        len(counts),
        len(frequent),
    )
    return {name: name if name in frequent else OTHERS for name in counts}


def training_batches(
    split: PackedDocuments,
    batch_size: int,
    seed: int,
    mine: Sequence[int] | None = None,
) -> OrderedBatches:
    """Endless training batches; every epoch is another permutation of the rows.

    Args:
      split: the packed rows.
      batch_size: rows of a global batch.
      seed: of the order.
      mine: the rows of a global batch that this process builds; by default all.
    """

    def rows_of(numbers: np.ndarray) -> Batch:
        return split.batch([split.rows[int(i)] for i in numbers])

    return OrderedBatches(endless(0, len(split.rows), seed), rows_of, batch_size, mine)


def eval_batches(
    split: PackedDocuments, batch_size: int, mine: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Every row once, in order; empty rows pad the last batch.

    `mine` are the rows of each global batch that this process builds; by default all.
    """
    starts = range(0, len(split.rows), batch_size)
    logging.info("data: %d held-out batches of %d rows", len(starts), batch_size)
    for start in starts:
        rows = split.rows[start : start + batch_size]
        rows = rows + [[]] * (batch_size - len(rows))
        yield split.batch(rows if mine is None else [rows[i] for i in mine])
