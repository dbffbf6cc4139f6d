"""Loads instruction rows from a file, the hub or the embedded sample; splits them."""

import collections
import dataclasses
import hashlib
import importlib.resources
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.config.choices import EMBEDDED, ROW_SOURCES
from research.config.data_knobs import (
    BY_SIZE,
    BY_SIZE_SINCE,
    MOST_HELD_OUT,
    ColumnsConfig,
    DataConfig,
)
from research.core.errors import UserError, look_up, nearest
from research.core.hub_access import HubAddress, ask_hub, cached_commit, is_hub
from research.data.instructions.row_columns import MISSING, map_columns, to_record
from research.data.instructions.row_files import read_files, row_files
from research.data.instructions.unused_columns import (
    REFUSED_SINCE,
    UnusedColumns,
    UnusedFacts,
)
from research.data.row_readers import STOPS, BadRowError, Row, TableRow
from research.parallel import agreement
from research.tokenize.conversation import Record


class RowMark(NamedTuple):
    """A usable row of which the texts are not kept.

    Attributes:
      number: its place among all rows of the source.
      key: see `content_key`.
      category: the label that it has.
      where: `file:line`.
    """

    number: int
    key: bytes
    category: str
    where: str

    @classmethod
    def of(cls, number: int, record: Record) -> "RowMark":
        return cls(number, content_key(record), record.category, record.where)


@dataclasses.dataclass(frozen=True)
class RowSource:
    """Rows that can be read any number of times.

    Attributes:
      origin: the file or dataset, for people.
      read: yields `(where, row)`.
      files: the files, or none for a dataset of the hub.
      revision: of the hub's dataset, or "".
      is_test: the rows are for a test, see `to_record`.
    """

    origin: str
    read: Callable[[], Iterator[tuple[str, Row | BadRowError]]]
    files: Sequence[Path] = ()
    revision: str = ""
    is_test: bool = False

    def record(
        self, where: str, row: Row, config: DataConfig,
        notes: collections.Counter[str] | None = None,
        unused: UnusedColumns | None = None,
    ) -> Record:  # fmt: skip
        """The record of a row, see `to_record`."""
        columns, edition = config.columns, config.edition
        return to_record(row, columns, where, notes, edition, unused, self.is_test)

    def named_files(self) -> list[tuple[str, Path]]:
        """The files, each with its name below the folder that all share."""
        shared = os.path.commonpath([file.parent for file in self.files])
        return [(str(file.relative_to(shared)), file) for file in self.files]


@dataclasses.dataclass(frozen=True)
class LoadedRows:
    """The usable rows of a source, which are read again when their texts are needed.

    Attributes:
      source: where they come from.
      config: how they are read.
      sha256: of the raw rows' text, to tell one data set from another.
      marks: the usable rows, in the source's order.
      schemas: how many of them were read from which columns.
      notes: how many values or rows each remark holds of.
      unused: facts about the columns that are filled and not used, by name.
      dropped: how many rows were dropped, by reason.
      examples: `file:line: reason` for each of them.
    """

    source: RowSource
    config: DataConfig
    sha256: str
    marks: list[RowMark]
    schemas: dict[str, int]
    notes: dict[str, int]
    unused: UnusedFacts
    dropped: dict[str, int]
    examples: list[str]

    def records(self, marks: Sequence[RowMark] | None = None) -> Iterator[Record]:
        """Reads the records of `marks`, by default of all, in the source's order.

        Raises:
          UserError: the rows are no longer those that were counted.
        """
        wanted = iter(self.marks if marks is None else marks)
        mark = next(wanted, None)
        for number, (where, row) in enumerate(self.source.read()):
            if mark is None:
                return
            if number != mark.number:
                continue
            if isinstance(row, BadRowError):
                break
            record = self.source.record(where, row, self.config)
            if content_key(record) != mark.key:
                break
            yield record
            mark = next(wanted, None)
        if mark is not None:
            raise UserError(
                f"{mark.where} has changed while the rows were read; start again once "
                "nothing writes to them"
            )


def load_rows(
    config: DataConfig, seed: int, source: RowSource | None = None
) -> LoadedRows:
    """Reads all rows once, and keeps no text of them.

    `source` has the rows; by default those that `config` names.

    Raises:
      UserError: a file, a column or a row cannot be used, a column that usually holds
        material is neither used nor ignored, or no row is usable.
    """
    source = source or find_rows(config)
    digest = hashlib.sha256()
    marks: list[RowMark] = []
    labels: dict[str, str] = {}
    schema_of = []
    seen: set[str] = set()
    unused = UnusedColumns(config.columns)
    notes: collections.Counter[str] = collections.Counter()
    dropped: collections.Counter[str] = collections.Counter()
    examples: list[str] = []
    for number, (where, row) in enumerate(source.read()):
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
        try:
            if isinstance(row, BadRowError):
                raise row
            seen.update(row)
            record = source.record(where, row, config, notes, unused)
        except BadRowError as bad:
            if bad.reason == MISSING and not marks:
                bad.remedy = bad.remedy or map_columns(row)  # It is no single row.
            refuse_row(bad, config)
            dropped[bad.reason] += 1
            examples.append(str(bad))
            continue
        # Equal labels share their memory.
        label, schema = (
            labels.setdefault(x, x) for x in (record.category, record.schema)
        )
        marks.append(RowMark.of(number, record)._replace(category=label))
        schema_of.append(schema)
    check_columns(config.columns, seen, source.is_test)
    if not 0 < config.edition < REFUSED_SINCE:
        unused.check()
    if not marks:
        counts = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        first = f"; the first is {examples[0]}" if examples else ""
        raise UserError(
            f"{source.origin} has no usable row ({counts or 'it is empty'}){first}"
        )
    schema_by_number = dict(zip((m.number for m in marks), schema_of, strict=True))
    if 0 < config.max_rows < len(set(_keys(marks, config))):
        marks = draw(marks, config.max_rows, config, seed)[0]
    schemas = collections.Counter(schema_by_number[mark.number] for mark in marks)
    return LoadedRows(
        source, config, digest.hexdigest(), marks, dict(schemas.most_common()),
        dict(notes), unused.facts(), dict(dropped), examples,
    )  # fmt: skip


def read_records(config: DataConfig, is_test: bool = False) -> Iterator[Record]:
    """Yields the usable rows that `config` names one by one, and keeps none of them.

    Raises:
      UserError: a file or a row cannot be used.
    """
    source = dataclasses.replace(find_rows(config), is_test=is_test)
    for where, row in source.read():
        try:
            if isinstance(row, BadRowError):
                raise row
            yield source.record(where, row, config)
        except BadRowError as bad:
            refuse_row(bad, config)


def refuse_row(bad: BadRowError, config: DataConfig) -> None:
    """Raises UserError for a bad row, unless such rows are dropped and counted."""
    stops = look_up(STOPS, config.bad_lines, "config.data.bad_lines")
    if stops and not bad.reason.startswith("empty"):
        remedy = bad.remedy or (
            "fix it, or skip and count such rows with --config.data.bad_lines=skip"
        )
        raise UserError(f"{bad}; {remedy}") from bad


def check_columns(columns: ColumnsConfig, seen: set[str], is_test: bool) -> None:
    """Raises UserError for a column that the user named and that no row has."""
    for field in dataclasses.fields(columns):
        if is_test and field.name == "response":
            continue
        given = getattr(columns, field.name)
        for name in (given,) if isinstance(given, str) else given:
            if seen and name != field.default and name not in seen:
                raise UserError(
                    f"config.data.columns.{field.name} is {given!r}, and no row has a "
                    f"column {name!r}{nearest(name, seen)}; the rows have "
                    f"{', '.join(sorted(seen))}"
                )


def find_rows(config: DataConfig, knob: str = "config.data.path") -> RowSource:
    """The rows of `config.path`, else of `config.source`, else the embedded sample.

    `knob` is the one that the user gave the path by.

    Raises:
      UserError: there is no such file, dataset or source.
    """
    if is_hub(config.path):
        return _hub_rows(HubAddress.parse(config.path, "dataset"), config)
    if config.path and config.path != EMBEDDED:
        return _file_rows(config.path, config.path, knob)
    if not config.path:
        source = None
        named = look_up(ROW_SOURCES, config.source, "config.data.source")
        address = HubAddress.parse(named, "dataset")
        try:
            source = _hub_rows(address, config)
        except UserError as error:
            logging.info("data: %s; the embedded sample is used", error)
        # One choice for all processes: the hub may answer only some of them.
        if agreement.everywhere(source is not None):
            return dataclasses.replace(source, origin=f"hub {address.name}")
    sample = importlib.resources.files("research.data.instructions") / "sample"
    with importlib.resources.as_file(sample) as folder:
        return _file_rows("embedded sample", str(folder), knob)


def _file_rows(origin: str, path: str, knob: str) -> RowSource:
    return RowSource(origin, lambda: read_files(path), row_files(path, knob))


def _hub_rows(address: HubAddress, config: DataConfig) -> RowSource:
    """The rows of a dataset through `datasets`, which maps them into memory.

    The hub is asked first, for `config.hub_timeout` seconds at most: its own client
    would retry for minutes. Without the hub, rows that were downloaded before are used.

    Raises:
      UserError: neither the hub nor its cache has them.
    """
    from huggingface_hub import constants

    reply = ask_hub(address, config.hub_timeout)
    if not reply.revision:
        # `datasets` reads this once, when it is imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    revision = reply.revision or cached_commit(address)
    try:
        if not revision:
            raise ConnectionError(reply.reason)
        import datasets

        rows = datasets.load_dataset(
            address.name,
            address.subset or None,
            split=address.split or "train",
            revision=revision,
        )
    except Exception as error:  # The hub's client raises a dozen unrelated kinds.
        raise UserError(
            f"the rows of {address} cannot be loaded ({error}); check its name, "
            "revision, subset and split, or give a local file as config.data.path"
        ) from error

    def read() -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(rows, start=1):
            yield f"{address.name}:{number}", TableRow(row)

    return RowSource(config.path, read, revision=f"{address} {revision}")


def held_out_count(config: DataConfig, marks: Sequence[RowMark]) -> int:
    """How many of the rows `config` keeps for evaluation.

    By its size, a data set holds out a tenth of its different rows, and so none of
    fewer than ten, but never more than `MOST_HELD_OUT`.
    """
    if config.held_out == BY_SIZE:
        if 0 < config.edition < BY_SIZE_SINCE:
            return MOST_HELD_OUT
        return min(MOST_HELD_OUT, len({mark.key for mark in marks}) // 10)
    if 0 < config.held_out < 1:
        return max(1, round(config.held_out * len(marks)))
    return int(config.held_out)


def draw(
    marks: Sequence[RowMark], count: int, config: DataConfig, seed: int
) -> tuple[list[RowMark], list[RowMark]]:
    """Draws `count` rows, from each category in proportion to its size.

    Equal rows stay together, whatever their category, so there may be a few more. A
    hash of their texts decides: neither the seed nor rows that are added move a row to
    the other side. Runs of edition 1 draw by `seed`, each row by itself. Largest
    remainders decide how fractions are rounded.

    Returns:
      The drawn rows and the others, both in the order of `marks`.

    Raises:
      UserError: no row would remain.
    """
    keys = _keys(marks, config)
    copies = collections.Counter(keys)
    total = len(marks)
    category_of: dict[Any, str] = {}
    for key, mark in zip(keys, marks, strict=True):
        category_of.setdefault(key, mark.category)
    by_category: dict[str, list[Any]] = {}
    for key, category in category_of.items():
        by_category.setdefault(category, []).append(key)
    sizes = {c: sum(copies[key] for key in own) for c, own in by_category.items()}
    shares = {c: count * size / total for c, size in sizes.items()}
    quota = {c: int(share) for c, share in shares.items()}
    by_remainder = sorted(shares, key=lambda c: (quota[c] - shares[c], c))
    for category in by_remainder[: count - sum(quota.values())]:
        quota[category] += 1
    rng = np.random.default_rng(seed)
    drawn: set[Any] = set()
    for category, own in sorted(by_category.items()):
        order = rng.permutation(own).tolist() if config.edition == 1 else sorted(own)
        taken = 0
        for key in order:
            if taken < quota[category]:
                drawn.add(key)
                taken += copies[key]
    if count >= total or len(drawn) == len(category_of):
        raise UserError(
            f"{count} rows should be held out of {total}, of which {len(category_of)} "
            "differ: give more rows, "
            f"{'a lower config.data.held_out, ' if len(category_of) > 1 else ''}or "
            "held-out rows of your own as config.data.eval_path"
        )
    sides: tuple[list[RowMark], list[RowMark]] = ([], [])
    for mark, key in zip(marks, keys, strict=True):
        sides[key not in drawn].append(mark)
    return sides


def _keys(marks: Sequence[RowMark], config: DataConfig) -> list[Any]:
    """The key of each row that decides its side; equal rows share one."""
    if config.edition == 1:
        return list(range(len(marks)))
    return [mark.key for mark in marks]


def content_key(record: Record) -> bytes:
    """The same for records with the same texts, in whatever file or category."""
    texts = [
        (turn.role, turn.text.strip(), *filter(None, [turn.fields]))
        for turn in record.turns
    ]
    content = repr((texts, record.context.strip()))
    return hashlib.sha256(content.encode()).digest()
