"""Measures each model: the losses of rows, and its answers to them."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core.errors import UserError
from research.core.visible_text import counted
from research.engine.answers.full_answer import FullAnswer
from research.engine.requests import Piece, Request, Sampling
from research.engine.slot_programs import CacheBlock
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.measuring.ask_models import ask_models
from research.evaluate.measuring.evaluated_models import (
    EvaluatedModel,
    ModelSet,
    open_whole,
)
from research.evaluate.measuring.evaluated_rows import (
    AskedRow,
    EvaluatedRow,
    ask_rows,
    pair_answer,
)
from research.evaluate.measuring.kept_lines import KeptLines, Key, digest
from research.evaluate.measuring.prompt_keys import PromptKeys
from research.evaluate.measuring.row_losses import (
    RowSums,
    measure_rows,
    measure_texts,
)
from research.runs.provenance import shared_parts
from research.tasks.task_protocol import EvaluationRows

# The code that decides the losses and answers of a model: all that this file imports
# but the view of the progress. Metrics, statistics and pages only read them.
COMPUTING = (
    *("core/", "config/", "weights/", "parallel/", "models/", "tokenize/", "formats/"),
    *("data/", "engine/", "tasks/", "checkpoints/", "runs/", "evaluate/measuring/"),
    *("evaluate/answered_row.py", "evaluate/held_out_losses.py"),
)


@dataclasses.dataclass(frozen=True)
class AskedRows:
    """The rows that all models can be asked, and why they cannot be asked the others.

    Attributes:
      by_model: the rows as each model is asked them, in one order.
      problems: `file:line: reason` for each row that is not asked.
    """

    by_model: dict[str, list[AskedRow]]
    problems: list[str]

    @classmethod
    def of(
        cls,
        rows: Sequence[EvaluatedRow],
        models: Sequence[EvaluatedModel],
        sampling: Sampling,
        stop: tuple[str, ...],
    ) -> "AskedRows":
        """Writes the prompts of all models.

        Raises:
          UserError: there is no row that all of them can be asked.
        """
        every = {}
        for each in models:
            longest = each.run.base.architecture.max_position
            every[each.name] = ask_rows(rows, each.run.prompts, sampling, longest, stop)
        problems: dict[str, str] = {}
        for asked in every.values():
            for row in asked:
                if row.problem:
                    problems.setdefault(row.row.id, f"{row.row.place}: {row.problem}")
        return cls(every, []).without(problems)

    def without(self, problems: Mapping[str, str]) -> "AskedRows":
        """All but these rows; `problems` has `file:line: reason` by row.

        Raises:
          UserError: no row is left.
        """
        by_model = {
            name: [x for x in asked if x.row.id not in problems]
            for name, asked in self.by_model.items()
        }
        named = [*self.problems, *problems.values()]
        if named and not any(by_model.values()):
            raise UserError(f"no row can be asked; the first is {named[0]}")
        return AskedRows(by_model, named)

    def requests(self) -> dict[str, dict[str, Request]]:
        """By model and row."""
        return {
            name: {x.row.id: x.request for x in asked}
            for name, asked in self.by_model.items()
        }

    def without_answers(self, model: EvaluatedModel) -> list[AnsweredRow]:
        """The rows as a model is asked them, before it has answered."""
        tokenizer = model.run.base.tokenizer
        return [pair_answer(x, tokenizer) for x in self.by_model[model.name]]


def plan_prompts(
    asked: AskedRows, models: Sequence[EvaluatedModel], folder: Path, slots: int
) -> PromptKeys:
    """The prompts that the pass over whole rows reads for `measure_answers`.

    Raises:
      UserError, SaveError: see `ask_models`.
    """
    requests = asked.requests()
    with _kept("answers", requests, models, folder, slots) as kept:
        return PromptKeys.planned(requests, models, kept.found)


def measure_answers(
    asked: AskedRows,
    models: Sequence[EvaluatedModel],
    folder: Path,
    slots: int,
    prompts: PromptKeys,
) -> dict[str, list[AnsweredRow]]:
    """The rows with the answers of each model, in one order.

    Args:
      asked: the rows.
      models: that answer.
      folder: has the answers that are known, and gets the others.
      slots: see `ask_models`.
      prompts: what is known of prompts; it is taken away.

    Raises:
      UserError, SaveError: see `ask_models`.
    """
    answers = ask_kept(
        "answers", asked.requests(), models, folder, slots, _whole, prompts.found
    )
    return {
        x.name: [
            pair_answer(
                row,
                x.run.base.tokenizer,
                FullAnswer(**answers[x.name, row.row.id]),
            )
            for row in asked.by_model[x.name]
        ]
        for x in models
    }


def ask_kept(
    kind: str,
    requests: Mapping[str, Mapping[str, Request]],
    models: Sequence[EvaluatedModel],
    folder: Path,
    slots: int,
    read: Callable[[list[Piece]], dict[str, Any]],
    prompts: MutableMapping[Key, CacheBlock] | None = None,
) -> dict[Key, dict[str, Any]]:
    """`ask_models`, where the answers of `kind` are kept in `folder`."""
    prompts = {} if prompts is None else prompts
    with _kept(kind, requests, models, folder, slots) as kept:
        return ask_models(models, requests, kept, slots, read, prompts)


def _kept(
    kind: str,
    requests: Mapping[str, Mapping[str, Request]],
    models: Sequence[EvaluatedModel],
    folder: Path,
    slots: int,
) -> contextlib.AbstractContextManager[KeptLines]:
    """The answers of `kind` to `requests` that are in `folder`."""
    name = digest(
        [(x.name, x.identity, x.base_in_memory) for x in models],
        requests,
        slots,
        computed_by(),
    )
    return KeptLines.opened(folder, kind, name)


def computed_by() -> list[Any]:
    """The parts that fix the numbers of a model, beside its weights and rows.

    The code that reads rows and models and computes, the packages and the variables of
    the environment, and the devices. An answer of another version is not reused.
    """
    device = jax.local_devices()[0]
    devices = (device.platform, device.device_kind, jax.local_device_count())
    return [sorted(shared_parts(code=COMPUTING).items()), devices]


def _whole(pieces: list[Piece]) -> dict[str, Any]:
    return dataclasses.asdict(FullAnswer.of(pieces))


def measure_losses(
    rows: Sequence[EvaluatedRow],
    found: ModelSet,
    readings: Mapping[str, EvaluationRows],
    changes: Mapping[str, Any],
    folder: Path,
    prompts: PromptKeys,
) -> dict[str, dict[str, RowSums]]:
    """The sums of the loss by model and row; a row that is too long has none.

    Args:
      rows: that are measured.
      found: the models.
      readings: the tokenised rows of each.
      changes: knobs that say how the rows were read.
      folder: has the losses that are known, and gets the others.
      prompts: gets what is computed of the prompts that it wants.

    Raises:
      DivergedError: a loss is not finite.
    """
    rows = [row for row in rows if row.record.has_answer]
    if not rows:
        return {x.name: {} for x in found.models}
    models, seed = found.models, found.target.run.config.seed
    name = digest(
        [(x.name, x.identity, x.base_in_memory) for x in models],
        [repr(found.config_for(x, changes).data) for x in models],
        [row.id for row in rows],
        computed_by(),
    )
    with KeptLines.opened(folder, "losses", name) as kept:
        for names, opens in open_whole(models):
            read = readings[names[-1]]
            documents = documents_of(read, rows)
            lacks = functools.partial(_lacks, prompts, read)
            known = _known(kept, names, documents, lacks)
            if len(known) == len(documents):
                continue
            take = {
                x: functools.partial(_take, prompts, read, documents, x)
                for x in names
                if prompts.wants(x)
            }
            count = counted(len(documents) - len(known), "row")
            logging.info("losses of %s on %s", " and ".join(names), count)
            given = read.packed, np.array([*documents]), seed, read.origin, take, known
            _keep(kept, documents, measure_rows(opens(), *given))
        lines = dict(kept.found)
    return {
        x.name: {
            row.id: lines[x.name, row.id] for row in rows if (x.name, row.id) in lines
        }
        for x in models
    }


def _known(
    kept: KeptLines,
    models: Sequence[str],
    documents: Mapping[int, str],
    lacks: Callable[[Key, int], bool] = lambda key, document: False,
) -> set[int]:
    """The documents of which all models have the loss, and none lacks a prompt."""
    return {
        number
        for number, row in documents.items()
        if all((x, row) in kept.found and not lacks((x, row), number) for x in models)
    }


def _keep(
    kept: KeptLines,
    documents: Mapping[int, str],
    measured: Iterable[tuple[str, int, RowSums]],
) -> None:
    """Keeps each of the losses as soon as it is measured."""
    for model, number, sums in measured:
        key = model, documents[number]
        if key not in kept.found:
            kept.add(key, sums)


def _lacks(prompts: PromptKeys, read: EvaluationRows, key: Key, document: int) -> bool:
    """Whether measuring a document would give a prompt that is missing."""
    return prompts.lacks(key, read.packed.documents[document].ids)


def _take(
    prompts: PromptKeys,
    read: EvaluationRows,
    documents: Mapping[int, str],
    model: str,
    document: int,
    k_LTKH: np.ndarray,
    v_LTKH: np.ndarray,
) -> None:
    """Keeps the part of a prompt; see `row_losses.TakeKeys`."""
    ids = read.packed.documents[document].ids
    prompts.take((model, documents[document]), ids, k_LTKH, v_LTKH)


def measure_text_losses(
    found: ModelSet,
    readings: Mapping[str, EvaluationRows],
    changes: Mapping[str, Any],
    folder: Path,
) -> dict[str, dict[str, RowSums]]:
    """`measure_losses` of whole texts: by model and the number of each document."""
    models = found.models
    name = digest(
        [(x.name, x.identity, x.base_in_memory) for x in models],
        [repr(found.config_for(x, changes).data) for x in models],
        [readings[x.name].sha256 for x in models],
        computed_by(),
    )
    with KeptLines.opened(folder, "losses", name) as kept:
        for names, opens in open_whole(models):
            read = readings[names[-1]]
            documents = {n: str(n) for n in range(len(read.texts.sizes))}
            known = _known(kept, names, documents)
            if len(known) == len(documents):
                continue
            count = counted(len(documents) - len(known), "document")
            logging.info("losses of %s on %s", " and ".join(names), count)
            measured = measure_texts(opens(), read.texts, read.origin, known)
            _keep(kept, documents, measured)
        lines = dict(kept.found)
    by_model: dict[str, dict[str, RowSums]] = {x.name: {} for x in models}
    for (model, row), sums in lines.items():
        by_model[model][row] = sums
    return by_model


def documents_of(read: EvaluationRows, rows: Sequence[EvaluatedRow]) -> dict[int, str]:
    """The ids of `rows` by the numbers of their documents.

    Raises:
      UserError: none of them has a document.
    """
    by_place = {row.place: row.id for row in rows}
    documents = read.packed.documents
    places = ((i, documents.where(i)) for i in range(len(documents)))
    found = {i: by_place[place] for i, place in places if place in by_place}
    if not found:
        raise UserError(f"no row of {read.origin} fits into config.data.seq_len")
    return found
