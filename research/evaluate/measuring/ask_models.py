"""Answers of several models to the same rows; models of one base answer together."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from research.engine.continuous_batching import Engine
from research.engine.requests import Piece, Request
from research.engine.text_generation import SlotDecoders
from research.evaluate.measuring.ask_engine import ask
from research.evaluate.measuring.evaluated_models import (
    EvaluatedModel,
    open_for_answers,
)
from research.evaluate.measuring.kept_lines import KeptLines, Key
from research.report.progress_view import AnswerCount
from research.runs.answering.open_for_answering import open_for_answering

# Answers at a time, unless the user says how many.
USUAL_SLOTS, ACCELERATOR_SLOTS = 16, 32
PREFIX_BYTES = 2**28  # Beginnings that prompts share, such as a system text, are kept.


def ask_models(
    models: Sequence[EvaluatedModel],
    requests: Mapping[str, Mapping[str, Request]],
    kept: KeptLines,
    slots: int,
    read: Callable[[list[Piece]], dict[str, Any]],
) -> dict[Key, dict[str, Any]]:
    """The answer of each model to each row; those that are kept are not made again.

    Each answer is a line of `kept` as soon as it ends.

    Args:
      models: that answer.
      requests: by model and row.
      kept: answers to the same requests.
      slots: answers at a time; 0: as many as suit the device.
      read: what is kept of an answer, as fields of JSON; among them `tokens`.

    Raises:
      UserError: a model cannot be opened or cannot answer.
      SaveError: a line could not be written.
    """
    slots = slots or usual_slots()
    wanted = {(x.name, row) for x in models for row in requests[x.name]}
    done = len(wanted & kept.found.keys())
    if done:
        logging.info("%d of %d answers are kept from before", done, len(wanted))
    count = AnswerCount("answers", done, len(wanted))
    groups = share_bases(models)
    if len(groups) > 1:
        listed = "; ".join(", ".join(x.name for x in group) for group in groups)
        logging.warning(
            "models of different bases answer one after another: %s", listed
        )
    for group in groups:
        every = {(x.name, row): r for x in group for row, r in requests[x.name].items()}
        missing = {k: _of(k, r, group) for k, r in every.items() if k not in kept.found}
        if not missing:
            continue
        # All requests count, so that a start that continues has slots of the same size.
        tokens = max(len(r.prompt) + r.sampling.max_new_tokens for r in every.values())
        with _engine(group, slots, tokens, len(missing)) as engine:
            for key, pieces in ask(engine, missing):
                kept.add(key, read(pieces))
                count.add(kept.found[key]["tokens"])
    return {key: kept.found[key] for key in wanted}


def usual_slots() -> int:
    """How many answers at a time suit the devices of this process."""
    is_cpu = jax.local_devices()[0].platform == "cpu"
    return USUAL_SLOTS if is_cpu else ACCELERATOR_SLOTS


def share_bases(models: Sequence[EvaluatedModel]) -> list[list[EvaluatedModel]]:
    """The models in groups that share one base in memory, in their order."""
    groups: dict[tuple, list[EvaluatedModel]] = {}
    for each in models:
        groups.setdefault(each.base_in_memory, []).append(each)
    return [*groups.values()]


def _of(key: Key, request: Request, group: Sequence[EvaluatedModel]) -> Request:
    """The request for the adapter of its model; the base has none."""
    model = next(x for x in group if x.name == key[0])
    has_adapter = model.is_adapted and model.step is not None
    return dataclasses.replace(request, adapter=model.name if has_adapter else "")


@contextlib.contextmanager
def _engine(
    group: Sequence[EvaluatedModel], slots: int, tokens: int, waiting: int
) -> Iterator[Engine]:
    """An engine in which all models of a group answer."""
    settings = {"most_waiting": waiting, "prefix_bytes": PREFIX_BYTES}
    first = group[0]
    if not first.is_adapted:
        opened = open_for_answers(first)
        decoders = SlotDecoders(opened.model, opened.mesh)
        weights = opened.weights[first.name]
        with decoders.opened(weights, slots, tokens) as decoder:
            yield Engine(decoder, first.run.base.tokenizer, **settings)
        return
    adapted = [x for x in group if x.step is not None]
    addresses = [f"{x.run.folder}@{x.step}" for x in adapted]
    shared = open_for_answering(addresses)
    decoders = SlotDecoders(shared.model, shared.mesh)
    with decoders.opened(shared.params, slots, tokens) as decoder:
        engine = Engine(
            decoder, shared.base.tokenizer, adapter_rows=len(adapted) + 1, **settings
        )
        for model, address in zip(adapted, shared.runs, strict=True):
            served, row = shared.read(address)
            engine.load_adapter(model.name, row, served.identity)
        yield engine
