"""The instruction dataset: rows tokenised, split, packed and ordered for training."""

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from research.config.knob_groups import DataConfig
from research.core.errors import UserError
from research.data.batch_order import OrderedBatches, endless
from research.data.instructions.packing import TokenizedDocument, build_batch, pack
from research.data.instructions.row_selection import (
    LoadedRows,
    content_key,
    draw,
    load_rows,
    refuse_row,
)
from research.data.row_readers import BadRowError
from research.data.token_batch import Batch
from research.tokenize.chat_template import ChatFormat
from research.tokenize.conversation import Record

# More characters than any tokenizer packs into a token, on average over a long text. A
# row that is enormous is seen by its length: its tokens alone could exhaust the memory.
TOKEN_CHARACTERS = 512
# Categories whose losses are reported, at most; of more, the rare ones are one.
MOST_CATEGORIES, RARE = 64, 0.01
OTHERS = "(other)"


@dataclasses.dataclass(frozen=True)
class PackedDocuments:
    """The packed documents of one side, training or held out.

    Attributes:
      documents: the tokenised records.
      rows: indices of the documents that share each row.
      seq_len: positions of a row.
    """

    documents: list[TokenizedDocument]
    rows: list[list[int]]
    seq_len: int

    @property
    def real_tokens(self) -> int:
        return sum(document.slots for document in self.documents)

    @property
    def trained_tokens(self) -> int:
        return sum(int(document.trained[1:].sum()) for document in self.documents)

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.real_tokens / (len(self.rows) * self.seq_len)

    def batch(self, rows: list[list[int]]) -> Batch:
        return build_batch(rows, self.documents, self.seq_len)


@dataclasses.dataclass(frozen=True)
class InstructionDataset:
    """Both sides of the rows, and the rows that were dropped.

    Attributes:
      rows: the rows as they were read.
      categories: their categories; `TokenizedDocument.group` numbers them.
      train, held_out: the packed sides.
      held_out_records: the held-out rows as text, for prompts.
      dropped: how many rows were dropped, by reason.
      truncated: how many rows were kept with a shorter context.
      copies: how many rows have the same texts as a row before them.
      examples: `file:line: reason` for each row that was dropped or cut.
    """

    rows: LoadedRows
    categories: list[str]
    train: PackedDocuments
    held_out: PackedDocuments
    held_out_records: list[Record]
    dropped: dict[str, int]
    truncated: int
    copies: int
    examples: list[str]


def load_dataset(
    config: DataConfig, seed: int, chat_format: ChatFormat
) -> InstructionDataset:
    """Reads, splits, tokenises and packs the rows of `config`.

    Raises:
      UserError: the data cannot be read, or nothing is left to train on.
    """
    rows = load_rows(config, seed)
    dropped: collections.Counter[str] = collections.Counter(rows.dropped)
    examples = list(rows.examples)
    if config.eval_path:
        own = dataclasses.replace(config, path=config.eval_path, max_rows=0)
        held_rows = load_rows(own, seed)
        held, rest = held_rows.records, _without(rows, held_rows, dropped, examples)
        dropped.update(held_rows.dropped)
        examples += held_rows.examples
        digests = f"{rows.sha256} {held_rows.sha256}".encode()
        rows = dataclasses.replace(rows, sha256=hashlib.sha256(digests).hexdigest())
    else:
        held, rest = draw(rows.records, config.held_out, config, seed)
    keys = {content_key(record) for record in held + rest}
    copies = len(held) + len(rest) - len(keys)
    group_of = _group_categories([record.category for record in held + rest])
    categories = sorted(set(group_of.values()))
    sides, truncated = {}, 0
    for name, side in (("train", rest), ("held_out", held)):
        records = [
            dataclasses.replace(record, category=group_of[record.category])
            for record in side
        ]
        kept, documents, cut = _tokenize(
            records, categories, chat_format, config, dropped, examples
        )
        truncated += cut
        if not documents:
            raise UserError(
                f"no {name} row fits config.data.seq_len={config.seq_len}; "
                "raise it, or check the rows reported as too long"
            )
        lengths = np.array([document.slots for document in documents])
        packed = pack(lengths, config.seq_len, seed)
        sides[name] = (kept, PackedDocuments(documents, packed, config.seq_len))
    return InstructionDataset(
        rows=rows,
        categories=categories,
        train=sides["train"][1],
        held_out=sides["held_out"][1],
        held_out_records=sides["held_out"][0],
        dropped=dict(dropped),
        truncated=truncated,
        copies=copies,
        examples=examples,
    )


def _without(
    rows: LoadedRows,
    held: LoadedRows,
    dropped: collections.Counter[str],
    examples: list[str],
) -> list[Record]:
    """The records that are not held out as well.

    Raises:
      UserError: there are none.
    """
    keys = {content_key(record) for record in held.records}
    kept = []
    for record in rows.records:
        if content_key(record) in keys:
            dropped["held out as well"] += 1
            examples.append(f"{record.where}: a row of config.data.eval_path equals it")
        else:
            kept.append(record)
    if not kept:
        raise UserError(
            f"every row of {rows.origin} is in {held.origin} as well, so none is left "
            "to train on; give other rows as config.data.eval_path"
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


def _tokenize(
    records: list[Record],
    categories: list[str],
    chat_format: ChatFormat,
    config: DataConfig,
    dropped: collections.Counter[str],
    examples: list[str],
) -> tuple[list[Record], list[TokenizedDocument], int]:
    """Tokenises records.

    Returns:
      The records that fit, their documents, and how many contexts were cut to fit.
      `dropped` and `examples` get those that do not fit.
    """
    budget = config.seq_len + 1  # n positions predict n ids of n + 1
    number = {category: i for i, category in enumerate(categories)}
    kept, documents, truncated = [], [], 0

    def drop(record: Record) -> None:
        dropped["too long"] += 1
        examples.append(f"{record.where}: longer than {config.seq_len} tokens")

    most = budget * TOKEN_CHARACTERS
    candidates = []
    for record in records:
        if len(record.context) > most and config.overlength == "truncate":
            record = dataclasses.replace(record, context=record.context[:most])
        texts = sum(len(turn.text) for turn in record.turns)
        if max(texts, len(record.context)) > most:
            drop(record)
        else:
            candidates.append(record)
    encodings = chat_format.encode_each(candidates)
    for record, encoded in zip(candidates, encodings, strict=True):
        if isinstance(encoded, UserError):
            bad = BadRowError("refused by the template", record.where, str(encoded))
            refuse_row(bad, config)
            dropped[bad.reason] += 1
            examples.append(str(bad))
            continue
        if len(encoded.ids) > budget and config.overlength == "truncate":
            encoded = chat_format.shorten(record, encoded, budget)
            if encoded is not None:
                truncated += 1
                examples.append(f"{record.where}: context cut to fit")
        if encoded is None or len(encoded.ids) > budget:
            drop(record)
            continue
        kept.append(record)
        documents.append(
            TokenizedDocument(
                np.array(encoded.ids, np.int32),
                np.array(encoded.trained, bool),
                number[record.category],
                record.where,
            )
        )
    return kept, documents, truncated


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
) -> list[Batch]:
    """Every row once, in order; empty rows pad the last batch.

    `mine` are the rows of each global batch that this process builds; by default all.
    """
    batches = []
    for start in range(0, len(split.rows), batch_size):
        rows = split.rows[start : start + batch_size]
        rows = rows + [[]] * (batch_size - len(rows))
        batches.append(split.batch(rows if mine is None else [rows[i] for i in mine]))
    logging.info("data: %d held-out batches of %d rows", len(batches), batch_size)
    return batches
