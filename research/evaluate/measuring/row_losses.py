"""The loss of each row, or of each whole text, by the objective of training."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xxhash

from research.config.knob_groups import MeshConfig
from research.core.errors import DivergedError
from research.data.instructions.instruction_dataset import PackedDocuments
from research.data.metric_sums import Ratio, Sums, evaluate_weights
from research.data.token_batch import Batch
from research.evaluate.held_out_losses import Evaluation, add_up, each_sum
from research.evaluate.measuring.evaluated_models import OpenModels
from research.parallel import mesh as meshes
from research.tasks.task_protocol import WholeTexts
from research.tasks.task_registry import make_objective

Params = dict[str, Any]
# The sums of one row by the name of the mean: numerator and denominator.
RowSums = dict[str, list[float]]
# Receives the number of a document, and the keys and values `[L, T, K, H]` of all its
# ids but the last.
TakeKeys = Callable[[int, np.ndarray, np.ndarray], None]
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)  # Tokens that end a group of lengths.


def measure_rows(
    opened: OpenModels,
    packed: PackedDocuments,
    documents: np.ndarray,
    seed: int,
    origin: str,
    take: Mapping[str, TakeKeys] | None = None,
    known: Container[int] = (),
) -> Iterator[tuple[str, int, RowSums]]:
    """Yields model, document and sums as soon as they are measured.

    A batch is the same whatever is known, and so are the sums of its documents.

    Args:
      opened: the models.
      packed: tokenised rows.
      documents: numbers of those that are measured.
      seed: of the packing.
      origin: of the rows, for people.
      take: by model, receives what it has computed of each document on the way.
      known: documents of which nothing is missing; a batch of such is not measured.

    Raises:
      DivergedError: a loss is not finite.
    """
    chosen = packed.only(documents, seed)
    count = _rows_per_pass(opened, 1)
    parts = [chosen.rows[i : i + count] for i in range(0, len(chosen.rows), count)]
    width = max(sum(map(len, part)) for part in parts)
    # Few widths, so that few programs compile.
    width = 1 << (width - 1).bit_length()
    mine = meshes.local_rows(opened.mesh, count)
    parts = [x for x in parts if any(i not in known for i in itertools.chain(*x))]

    def batches() -> Iterator[Batch]:
        for part in parts:
            yield _numbered(chosen, part + [[]] * (count - len(part)), mine)

    takers = take or {}

    def take_part(number: int, model: str, k: np.ndarray, v: np.ndarray) -> None:
        for at, row in enumerate(parts[number]):
            ends = np.cumsum(chosen.documents.slots[row])
            for document, end in zip(row, ends, strict=True):
                where = slice(end - chosen.documents.slots[document], end)
                takers[model](document, k[:, at, where], v[:, at, where])

    measured = _measure(opened, batches(), count, width, take_part, {*takers})
    for part, by_model in zip(parts, measured, strict=True):
        numbers = [*itertools.chain(*part)]
        for name, rows in _rows_of(by_model, len(numbers), origin):
            for number, row in zip(numbers, rows, strict=True):
                yield name, number, row


def _rows_of(
    by_model: Mapping[str, Sums], count: int, origin: str
) -> Iterator[tuple[str, list[RowSums]]]:
    """The sums of the first `count` groups, by model.

    Raises:
      DivergedError: a loss is not finite.
    """
    for name, sums in by_model.items():
        rows: list[RowSums] = [{} for _ in range(count)]
        for mean, ratio in sums.items():
            if np.ndim(ratio.denominator):
                pairs = np.stack([*map(np.float64, ratio)], 1)[:count].tolist()
                for row, pair in zip(rows, pairs, strict=True):
                    row[mean] = pair
        if not all(math.isfinite(loss := row["loss"][0]) for row in rows):
            _refuse(name, origin, loss)
        yield name, rows


def measure_texts(
    opened: OpenModels, texts: WholeTexts, origin: str, known: Container[int] = ()
) -> Iterator[tuple[str, int, RowSums]]:
    """`measure_rows` of documents, of which a long one may fill many rows.

    Raises:
      DivergedError: a loss is not finite.
    """
    objective = make_objective(opened.config, opened.mesh, 1)
    count = _rows_per_pass(opened, objective.rows_per_unit)
    mine = [*meshes.local_rows(opened.mesh, count)]
    # Documents follow each other, so that those of a batch are a range.
    ranges = []
    for _, numbers in texts.batches(count):
        inside = numbers[numbers >= 0]
        ranges.append((int(inside.min()), int(inside.max()) + 1))
    width = max(last - first for first, last in ranges)
    width = 1 << (width - 1).bit_length()

    wanted = [any(i not in known for i in range(*part)) for part in ranges]

    def batches() -> Iterator[Batch]:
        for (batch, numbers), (first, _), is_wanted in zip(
            texts.batches(count), ranges, wanted, strict=True
        ):
            if is_wanted:
                groups = np.maximum(numbers - first, 0).astype(np.int32)
                batch = dataclasses.replace(batch, groups=groups)
                yield jax.tree.map(lambda array: array[mine], batch)

    ranges = [*itertools.compress(ranges, wanted)]
    # A document is complete when the next batch begins with another one.
    ends = [first for first, _ in ranges[1:]] + [len(texts.sizes)]
    measured = _measure(opened, batches(), count, width)
    open_rows: dict[str, dict[int, RowSums]] = {name: {} for name in opened.weights}
    for (first, last), end, by_model in zip(ranges, ends, measured, strict=True):
        for name, rows in _rows_of(by_model, last - first, origin):
            own = open_rows[name]
            for number, row in enumerate(rows, first):
                own[number] = _added(own.get(number, {}), row)
            for number in [x for x in own if x < end]:
                row = own.pop(number)
                # Batches of a known one may be missing.
                if number not in known:
                    yield name, number, row


def _added(before: RowSums, more: RowSums) -> RowSums:
    return {
        mean: [x + y for x, y in zip(before.get(mean, (0.0, 0.0)), pair, strict=True)]
        for mean, pair in more.items()
    }


def same_texts(texts: WholeTexts) -> list[int]:
    """A number for each document, the same for those with equal ids."""
    digests = [xxhash.xxh3_64() for _ in texts.sizes]
    mark = None
    for batch, numbers in texts.batches(1):
        mark = batch.tokens[0, 0] if mark is None else mark
        for number in np.unique(numbers[numbers >= 0]):
            ids = batch.targets[numbers == number]
            # Behind the last document no other begins.
            digests[number].update(ids[ids != mark].tobytes())
    first: dict[int, int] = {}
    return [first.setdefault(x.intdigest(), len(first)) for x in digests]


def group_rows(
    rows: Sequence[RowSums],
    labels: Sequence[str],
    text_bytes: Sequence[int],
    loss_unit: str,
) -> Evaluation:
    """The means over all rows, and over those of each label.

    `text_bytes` are of each row's answers; zeros if its loss is no coding of them.
    """
    groups = sorted(set(labels))
    index = [groups.index(label) for label in labels]
    sums: Sums = {}
    for name in rows[0]:
        pairs = np.array([row[name] for row in rows], np.float64)
        total = np.zeros((len(groups), 2))
        np.add.at(total, index, pairs)
        sums[name] = Ratio(total[:, 0], total[:, 1])
    in_groups = np.bincount(index, text_bytes, len(groups)).astype(int).tolist()
    return add_up([sums], groups, dict(zip(groups, in_groups, strict=True)), loss_unit)


def loss_unit(config: Any) -> str:
    """The unit of the losses of a run."""
    mesh = meshes.make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    return make_objective(config, mesh, 1).loss_unit


def length_label(tokens: int) -> str:
    """The group of lengths that a row of so many tokens belongs to.

    The labels sort in the order of the lengths.
    """
    for low, high in itertools.pairwise((0, *LENGTHS)):
        if tokens <= high:
            return f"{low + 1:4} to {high:4} tokens"
    return f"over {LENGTHS[-1]} tokens"


def _rows_per_pass(opened: OpenModels, rows_per_unit: int) -> int:
    """The last rows of a batch may be empty, so it has as many as the mesh needs."""
    unit = meshes.batch_shards(opened.mesh) * rows_per_unit
    return -(-opened.config.data.rows_per_pass // unit) * unit


def _measure(
    opened: OpenModels,
    batches: Iterator[Batch],
    count: int,
    groups: int,
    take: Callable[[int, str, np.ndarray, np.ndarray], None] | None = None,
    taken: Container[str] = (),
) -> Iterator[Mapping[str, Sums]]:
    """Yields the sums of each batch by model, in one pass, which builds a batch once.

    `take` receives the number of a batch, a model that is `taken`, and its keys and
    values `[L, B, T, K, H]`.
    """
    objective = make_objective(opened.config, opened.mesh, groups)
    whole = meshes.replicated(opened.mesh)

    @functools.partial(jax.jit, static_argnums=2)
    def read(weights: Params, batch: Batch, keeps: bool) -> tuple[Sums, list[Any]]:
        kept: list[Any] = []
        keep = (lambda *keys: kept.append(keys)) if keeps else None
        model = opened.model.with_options(keep=keep)
        sums = evaluate_weights(objective, model, weights, batch)
        return sums, jax.lax.with_sharding_constraint(kept, whole)

    numbers = itertools.count()
    under_way: list[tuple[int, dict[str, list[Any]]]] = []

    def take_first() -> None:
        number, by_model = under_way.pop(0)
        for model, kept in by_model.items():
            # An objective that reads more hides which rows are the batch.
            if len(kept) == 1:
                take(number, model, *map(np.asarray, kept[0]))

    def measure(batch: Batch) -> dict[str, Sums]:
        found = {
            name: read(weights, batch, name in taken)
            for name, weights in opened.weights.items()
        }
        # The devices compute this batch while the keys of the one before leave.
        under_way.append((next(numbers), {k: x[1] for k, x in found.items()}))
        if len(under_way) > 1:
            take_first()
        return {k: sums for k, (sums, _) in found.items()}

    placed = (meshes.to_global(batch, opened.mesh, rows=count) for batch in batches)
    yield from each_sum(measure, placed)
    while under_way:
        take_first()


def _numbered(
    packed: PackedDocuments, rows: list[list[int]], mine: Sequence[int]
) -> Batch:
    """A batch whose groups are its documents, numbered over all of its rows."""
    first = np.cumsum([0, *map(len, rows)])[list(mine)]
    batch = packed.batch([rows[i] for i in mine])
    groups = np.maximum(first[:, None] + batch.segments - 1, 0)
    return dataclasses.replace(batch, groups=groups.astype(np.int32))


def _refuse(name: str, origin: str, loss: Any) -> None:
    raise DivergedError(
        f"the loss of the {name} model on {origin} is {loss}: look at the weights, or "
        "choose another --step",
        0,
        None,
    )
