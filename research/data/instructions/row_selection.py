"""Loads instruction rows from a file, the hub or the embedded sample; splits them."""

import collections
import dataclasses
import hashlib
import importlib.resources
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from research.config.hub_pins import DEFAULT_ROWS, EMBEDDED
from research.config.knob_groups import ColumnsConfig, DataConfig
from research.core.errors import UserError, nearest
from research.core.hub_access import HubAddress, ask_hub, cached_commit, is_hub
from research.data.instructions.row_columns import to_record
from research.data.instructions.row_files import read_files
from research.data.row_readers import BadRowError
from research.parallel import agreement
from research.tokenize.conversation import Record

DOLLY = HubAddress.parse(DEFAULT_ROWS, "dataset")


@dataclasses.dataclass(frozen=True)
class LoadedRows:
    """The usable rows of a source.

    Attributes:
      origin: the file or dataset, for people.
      sha256: of the raw rows' text, to tell one data set from another.
      records: the usable rows, in the source's order.
      schemas: how many of them were read from which columns.
      notes: how many values or rows each remark holds of.
      dropped: how many rows were dropped, by reason.
      examples: `file:line: reason` for each of them.
    """

    origin: str
    sha256: str
    records: list[Record]
    schemas: dict[str, int]
    notes: dict[str, int]
    dropped: dict[str, int]
    examples: list[str]

    def categories(self) -> dict[str, int]:
        return dict(
            sorted(collections.Counter(r.category for r in self.records).items())
        )


def load_rows(config: DataConfig, seed: int) -> LoadedRows:
    """Loads the rows of `config.path`, else of the hub, else of the embedded sample.

    Raises:
      UserError: a file, a column or a row cannot be used, or no row is usable.
    """
    origin, raw = _resolve(config)
    digest = hashlib.sha256()
    records: list[Record] = []
    seen: set[str] = set()
    notes: collections.Counter[str] = collections.Counter()
    dropped: collections.Counter[str] = collections.Counter()
    examples: list[str] = []
    for where, row in raw:
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
        try:
            if isinstance(row, BadRowError):
                raise row
            seen.update(row)
            records.append(to_record(row, config.columns, where, notes, config.edition))
        except BadRowError as bad:
            refuse_row(bad, config)
            dropped[bad.reason] += 1
            examples.append(str(bad))
    check_columns(config.columns, seen)
    if not records:
        counts = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        first = f"; the first is {examples[0]}" if examples else ""
        raise UserError(
            f"{origin} has no usable row ({counts or 'it is empty'}){first}"
        )
    for note, count in notes.items():
        logging.warning("data: %s (%d times)", note, count)
    if 0 < config.max_rows < len(set(_keys(records, config))):
        records = draw(records, config.max_rows, config, seed)[0]
    logging.info(
        "data: %s, %d rows, sha256 %s", origin, len(records), digest.hexdigest()
    )
    schemas = collections.Counter(record.schema for record in records)
    return LoadedRows(
        origin, digest.hexdigest(), records, dict(schemas.most_common()), dict(notes),
        dict(dropped), examples,
    )  # fmt: skip


def refuse_row(bad: BadRowError, config: DataConfig) -> None:
    """Raises UserError for a bad row, unless such rows are dropped and counted."""
    if config.bad_lines == "stop" and not bad.reason.startswith("empty"):
        raise UserError(
            f"{bad}; fix it, or skip and count such rows with "
            "--config.data.bad_lines=skip"
        ) from bad


def check_columns(columns: ColumnsConfig, seen: set[str]) -> None:
    """Raises UserError for a column that the user named and that no row has."""
    for field in dataclasses.fields(columns):
        name = getattr(columns, field.name)
        if seen and name != field.default and name not in seen:
            raise UserError(
                f"config.data.columns.{field.name} is {name!r}, and no row has such a "
                f"column{nearest(name, seen)}; the rows have {', '.join(sorted(seen))}"
            )


def _resolve(config: DataConfig) -> tuple[str, Iterable[tuple[str, Any]]]:
    if is_hub(config.path):
        return config.path, _hub_rows(HubAddress.parse(config.path, "dataset"), config)
    if config.path and config.path != EMBEDDED:
        return config.path, read_files(config.path)
    if not config.path:
        rows = None
        try:
            rows = _hub_rows(DOLLY, config)
        except UserError as error:
            logging.info("data: %s; the embedded sample is used", error)
        # One choice for all processes: the hub may answer only some of them.
        if agreement.everywhere(rows is not None):
            return f"hub {DOLLY.name}", rows
    return "embedded sample", _embedded_rows()


def _embedded_rows() -> Iterator[tuple[str, Any]]:
    folder = importlib.resources.files("research.data.instructions") / "sample"
    with importlib.resources.as_file(folder) as path:
        yield from read_files(str(path))


def _hub_rows(address: HubAddress, config: DataConfig) -> list[tuple[str, Any]]:
    """All rows of a dataset through `datasets`.

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
    return [(f"{address.name}:{i}", row) for i, row in enumerate(rows, start=1)]


def draw(
    records: list[Record], count: int, config: DataConfig, seed: int
) -> tuple[list[Record], list[Record]]:
    """Draws `count` records, from each category in proportion to its size.

    Equal records stay together, whatever their category, so there may be a few more. A
    hash of their texts decides: neither the seed nor rows that are added move a record
    to the other side. Runs of edition 1 draw by `seed`, each record by itself. Largest
    remainders decide how fractions are rounded.

    Returns:
      The drawn records and the others, both in the order of `records`.

    Raises:
      UserError: no record would remain.
    """
    keys = _keys(records, config)
    copies = collections.Counter(keys)
    total = len(records)
    category_of: dict[Any, str] = {}
    for key, record in zip(keys, records, strict=True):
        category_of.setdefault(key, record.category)
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
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record, key in zip(records, keys, strict=True):
        sides[key not in drawn].append(record)
    return sides


def _keys(records: list[Record], config: DataConfig) -> list[Any]:
    """The key of each record that decides its side; equal records share one."""
    if config.edition == 1:
        return list(range(len(records)))
    return [content_key(record) for record in records]


def content_key(record: Record) -> bytes:
    """The same for records with the same texts, in whatever file or category."""
    texts = [(turn.role, turn.text.strip()) for turn in record.turns]
    content = repr((texts, record.context.strip()))
    return hashlib.sha256(content.encode()).digest()
