"""Loads instruction rows from a file, the hub or the embedded sample; splits them."""

import collections
import dataclasses
import hashlib
import importlib.resources
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from research.config.hub_pins import DEFAULT_ROWS, EMBEDDED
from research.config.knob_groups import ColumnsConfig, DataConfig
from research.core.errors import UserError, nearest
from research.core.hub_access import HubAddress, ask_hub, cached_commit, is_hub
from research.data.instructions.row_columns import to_record
from research.data.row_readers import BadRowError, read_rows
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
      dropped: how many rows were dropped, by reason.
      examples: `file:line: reason` for each of them.
    """

    origin: str
    sha256: str
    records: list[Record]
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
    dropped: collections.Counter[str] = collections.Counter()
    examples: list[str] = []
    for where, row in raw:
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
        try:
            if isinstance(row, BadRowError):
                raise row
            seen.update(row)
            records.append(to_record(row, config.columns, where))
        except BadRowError as bad:
            unreadable = not bad.reason.startswith("empty")
            if unreadable and config.bad_lines == "stop":
                raise UserError(
                    f"{bad}; fix it, or skip and count such rows with "
                    "--config.data.bad_lines=skip"
                ) from bad
            dropped[bad.reason] += 1
            examples.append(str(bad))
    _check_columns(config.columns, seen)
    if not records:
        left_out = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        raise UserError(f"{origin} has no usable row ({left_out or 'it is empty'})")
    if 0 < config.max_rows < len(records):
        records = split_stratified(records, config.max_rows, seed)[0]
    logging.info(
        "data: %s, %d rows, sha256 %s", origin, len(records), digest.hexdigest()
    )
    return LoadedRows(origin, digest.hexdigest(), records, dict(dropped), examples)


def _check_columns(columns: ColumnsConfig, seen: set[str]) -> None:
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
        return config.path, read_rows(Path(config.path).expanduser())
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
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        with importlib.resources.as_file(file) as path:
            yield from read_rows(path)


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


def split_stratified(
    records: list[Record], count: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Draws `count` records, from each category in proportion to its size.

    Largest remainders decide how fractions are rounded. The draw depends on `seed`
    alone.

    Returns:
      The drawn records and the others, both in the order of `records`.

    Raises:
      UserError: no record would remain.
    """
    if count >= len(records):
        raise UserError(
            f"{count} rows should be held out of {len(records)}: lower "
            "config.data.held_out or give more rows"
        )
    by_category: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        by_category.setdefault(record.category, []).append(index)
    shares = {c: count * len(rows) / len(records) for c, rows in by_category.items()}
    quota = {c: int(share) for c, share in shares.items()}
    by_remainder = sorted(shares, key=lambda c: (quota[c] - shares[c], c))
    for category in by_remainder[: count - sum(quota.values())]:
        quota[category] += 1
    rng = np.random.default_rng(seed)
    drawn: set[int] = set()
    for category in sorted(by_category):
        rows = by_category[category]
        drawn.update(rng.permutation(rows)[: quota[category]].tolist())
    chosen = [record for i, record in enumerate(records) if i in drawn]
    return chosen, [record for i, record in enumerate(records) if i not in drawn]
