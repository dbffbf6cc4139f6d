"""Instruction rows that a model is evaluated on: of files, or held out of training."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator

from research.config.run_config import Config
from research.core.visible_text import counted
from research.data.instructions.instruction_dataset import load_dataset
from research.data.instructions.row_selection import read_records
from research.data.instructions.row_store import StoredDocuments
from research.data.instructions.unused_columns import describe_unused
from research.formats.base_model import Base
from research.tasks.row_preview import RowPage, preview_rows
from research.tasks.task_protocol import EvaluationRows
from research.tokenize.chat_template import ChatFormat
from research.tokenize.conversation import Record
from research.tokenize.tokenizer import Tokenizer

MOST_COMPARED = 200_000  # rows


def chat_format(config: Config, tokenizer: Tokenizer) -> ChatFormat:
    """How the rows of `config` become ids."""
    data = config.data
    return ChatFormat(tokenizer, data.template, data.system, data.template_args)


def rows_of_files(config: Config, base: Base, files: str) -> EvaluationRows:
    """Every usable row of the files is evaluated, packed as held-out rows are.

    A row without an answer is one of `records`, and has no document.
    """
    chat = chat_format(config, base.tokenizer)
    whole = {"eval_path": "", "held_out": 0, "max_rows": 0}
    rows = dataclasses.replace(config.data, path=files, **whole)
    data = load_dataset(rows, config.seed, chat, config.text, "--data", is_test=True)
    return EvaluationRows(
        groups=data.categories,
        origin=f"{data.origin}, {counted(data.counts.total, 'row')}",
        sha256=data.counts.sha256,
        left_out=data.examples,
        unused=describe_unused(data.counts.unused),
        packed=data.train,
        records=functools.partial(read_records, rows, is_test=True),
    )


def held_out_rows(config: Config, base: Base) -> EvaluationRows | None:
    """The rows that a run of `config` does not train, or those of `data.eval_path`."""
    chat = chat_format(config, base.tokenizer)
    data = load_dataset(config.data, config.seed, chat, config.text)
    if not data.held_out.rows:
        return None
    origin = config.data.eval_path or f"held out of {data.origin}"
    return EvaluationRows(
        groups=data.categories,
        origin=f"{origin}, {counted(len(data.held_out_records), 'row')}",
        sha256=data.counts.sha256,
        left_out=data.held_out_examples,
        packed=data.held_out,
        records=lambda: data.held_out_records,
    )


def browse_rows(config: Config, base: Base, first: int, count: int) -> RowPage:
    """The training rows from number `first` on, at most `count` of them.

    Copies are searched among the first `MOST_COMPARED` rows of each side.
    """
    chat = chat_format(config, base.tokenizer)
    data = load_dataset(config.data, config.seed, chat, config.text)
    documents = data.train.documents
    numbers = range(first, min(first + count, len(documents)))
    shown = preview_rows(
        data.train.batch([[number] for number in numbers]),
        data.categories,
        lambda ids: base.tokenizer.decode(ids, skip_control=False),
        lambda row, _: documents.where(numbers[row]),
    )
    counts, sides = data.counts, (documents, data.held_out.documents)
    return RowPage(
        first=first,
        rows=shown,
        lengths=documents.slots + 1,
        copies=_copies(sides),
        too_long=counts.truncated + counts.dropped.get("too long", 0),
    )


def _copies(sides: Iterable[StoredDocuments]) -> list[tuple[str, str]]:
    """`(place, place of the first)` of documents with the ids of one before."""
    before: dict[bytes, str] = {}
    found = []
    for side in sides:
        for number in range(min(len(side), MOST_COMPARED)):
            ids, place = side[number].ids, side.where(number)
            key = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
            if (first := before.setdefault(key, place)) != place:
                found.append((place, first))
    return found


def training_records(config: Config, base: Base) -> Iterator[Record]:
    """Yields the rows that a run of `config` trains, one by one, as text."""
    chat = chat_format(config, base.tokenizer)
    data = load_dataset(config.data, config.seed, chat, config.text)
    documents = data.train.documents
    # Both are in the order of the source.
    places = map(documents.where, range(len(documents)))
    place = next(places, None)
    for record in read_records(config.data):
        if record.where == place:
            yield record
            place = next(places, None)
