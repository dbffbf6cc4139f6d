"""Answers of several models to the same rows; models of one base answer together."""

import contextlib
import dataclasses
import logging
from collections.abc import (
    Callable,
    Container,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

import jax

from research.engine.continuous_batching import Engine
from research.engine.requests import Piece, Request
from research.engine.slot_programs import CacheBlock
from research.engine.text_generation import SlotDecoders
from research.evaluate.measuring.ask_engine import ask
from research.evaluate.measuring.evaluated_models import (
    EvaluatedModel,
    open_for_answers,
)
from research.evaluate.measuring.kept_lines import KeptLines, Key
from research.report.progress_view import AnswerCount
from research.runs.answering.found_adapters import FoundFolder
from research.runs.answering.open_for_answering import open_for_answering
from research.tokenize.tokenizer import Tokenizer
from research.weights.adapters.serving_bank import Row

# Answers at a time, unless the user says how many. A CPU has room for so many tokens in
# all slots: the shorter the answers, the more of them share a pass over the weights.
ACCELERATOR_SLOTS = 32
MANY_SLOTS, FEW_TOKENS = 64, 512
CPU_TOKENS = MANY_SLOTS * FEW_TOKENS
LONG_CHUNK = 256  # Tokens of a prompt that are read at a time, where slots are longer.
PREFIX_BYTES = 2**28  # Beginnings that prompts share, such as a system text, are kept.


def ask_models(
    models: Sequence[EvaluatedModel],
    requests: Mapping[str, Mapping[str, Request]],
    kept: KeptLines,
    slots: int,
    read: Callable[[list[Piece]], dict[str, Any]],
    prompts: MutableMapping[Key, CacheBlock],
) -> dict[Key, dict[str, Any]]:
    """The answer of each model to each row; those that are kept are not made again.

    Each answer is a line of `kept` as soon as it ends.

    Args:
      models: that answer.
      requests: by model and row.
      kept: answers to the same requests.
      slots: answers at a time; 0: as many as suit the device.
      read: what is kept of an answer, as fields of JSON; among them `tokens`.
      prompts: keys and values of prompts that are known; each is taken away.

    Raises:
      UserError: a model cannot be opened or cannot answer.
      SaveError: a line could not be written.
    """
    wanted = {(x.name, row) for x in models for row in requests[x.name]}
    done = len(wanted & kept.found.keys())
    if done:
        logging.info("%d of %d answers are kept from before", done, len(wanted))
    count = AnswerCount("answers", done, len(wanted))
    left = [requests[name][row] for name, row in wanted - kept.found.keys()]
    work = _Work(len(left), sum(len(request.prompt) for request in left))
    groups = share_bases(models)
    if len(groups) > 1:
        listed = "; ".join(", ".join(x.name for x in group) for group in groups)
        logging.warning(
            "models of different bases answer one after another: %s", listed
        )
    for group in groups:
        every = requests_of(group, requests)
        if every.keys() <= kept.found.keys():
            continue
        opened, before = open_group(group), work.done
        asked = ask_group(opened, every, kept.found, slots, prompts)
        for key, pieces, done in asked:
            kept.add(key, read(pieces))
            count.add(kept.found[key]["tokens"], work.share(pieces, before + done))
        del opened  # The base of the next group takes its memory.
    return {key: kept.found[key] for key in wanted}


def _parts(
    requests: Mapping[Key, Request], slots: int
) -> list[tuple[int, dict[Key, Request]]]:
    """Requests that are answered together, and how many at a time; `slots` of a user.

    Slots are as long as their longest answer, and a round takes as long for each slot
    as for the longest. So on a CPU answers of like lengths are made together, if there
    are enough to fill the slots; the longest are made first.
    """
    if slots or jax.local_devices()[0].platform != "cpu":
        return [(slots or ACCELERATOR_SLOTS, dict(requests))]
    parts: list[dict[Key, Request]] = [{}]
    length = FEW_TOKENS
    for key in sorted(requests, key=lambda key: _room(requests[key])):
        while _room(requests[key]) > length:
            if len(parts[-1]) >= max(1, CPU_TOKENS // length):
                parts.append({})
            length *= 2
        parts[-1][key] = requests[key]
    return [(_cpu_slots(part), part) for part in reversed(parts)]


def _cpu_slots(requests: Mapping[Key, Request]) -> int:
    longest = max(FEW_TOKENS, *map(_room, requests.values()))
    room = CPU_TOKENS >> (longest - 1).bit_length()
    return max(1, min(room, 1 << (len(requests) - 1).bit_length()))


def _room(request: Request) -> int:
    return len(request.prompt) + request.sampling.max_new_tokens


@dataclasses.dataclass
class _Work:
    """How far all answers are, by the tokens of prompts and answers.

    Attributes:
      answers: that are to be made.
      prompts: their tokens.
      ended, new: answers that have ended, and their tokens.
      done: tokens of prompts and answers, ended or not.
    """

    answers: int
    prompts: int
    ended: int = 0
    new: int = 0
    done: int = 0

    def share(self, pieces: Sequence[Piece], done: int) -> float:
        """One more answer has ended. The share that is done; 0: too early to tell."""
        self.ended, self.done = self.ended + 1, done
        self.new += sum(len(piece.ids) for piece in pieces)
        # The first to end are the short ones.
        if self.ended < min(MANY_SLOTS, self.answers):
            return 0.0
        return min(1.0, done / (self.prompts + self.new / self.ended * self.answers))


def share_bases(models: Sequence[EvaluatedModel]) -> list[list[EvaluatedModel]]:
    """The models in groups that share one base in memory, in their order."""
    groups: dict[tuple, list[EvaluatedModel]] = {}
    for each in models:
        groups.setdefault(each.base_in_memory, []).append(each)
    return [*groups.values()]


def requests_of(
    group: Sequence[EvaluatedModel], requests: Mapping[str, Mapping[str, Request]]
) -> dict[Key, Request]:
    """The requests to the models of a group, by model and row."""
    return {
        (x.name, row): _of((x.name, row), request, group)
        for x in group
        for row, request in requests[x.name].items()
    }


def _of(key: Key, request: Request, group: Sequence[EvaluatedModel]) -> Request:
    """The request for the adapter of its model; the base has none."""
    model = next(x for x in group if x.name == key[0])
    has_adapter = model.shares_base and model.step is not None
    return dataclasses.replace(request, adapter=model.name if has_adapter else "")


@dataclasses.dataclass
class OpenGroup:
    """Models of one base in memory.

    Attributes:
      decoders: of the base.
      params: of the base, with a bank if there are adapters.
      tokenizer: of all models.
      adapters: name, row of the bank and identity.
    """

    decoders: SlotDecoders
    params: dict[str, Any]
    tokenizer: Tokenizer
    adapters: list[tuple[str, Row, str]]

    @contextlib.contextmanager
    def engine(self, slots: int, tokens: int, waiting: int) -> Iterator[Engine]:
        """An engine in which all of the models answer."""
        chunk = LONG_CHUNK if tokens > FEW_TOKENS else None
        with self.decoders.opened(self.params, slots, tokens, chunk) as decoder:
            engine = Engine(
                decoder,
                self.tokenizer,
                most_waiting=waiting,
                prefix_bytes=PREFIX_BYTES,
                adapter_rows=len(self.adapters) + bool(self.adapters),
                prompts_first=True,
            )
            for adapter in self.adapters:
                engine.load_adapter(*adapter)
            # Loading has consumed the arrays of the bank.
            self.params = decoder.params
            yield engine


def ask_group(
    opened: OpenGroup,
    requests: Mapping[Key, Request],
    known: Container[Key],
    slots: int,
    prompts: MutableMapping[Key, CacheBlock],
) -> Iterator[tuple[Key, list[Piece], int]]:
    """Yields each answer that is not known, and the tokens of prompts and answers so
    far: those that are under way count.
    """
    before = 0
    # All requests count, so that a start that continues has slots of the same size.
    for number, part in _parts(requests, slots):
        missing = {k: r for k, r in part.items() if k not in known}
        if not missing:
            continue
        tokens = max(map(_room, part.values()))
        with opened.engine(number, tokens, len(missing)) as engine:
            for key, pieces in ask(engine, missing, prompts):
                stats = engine.stats()
                done = before + stats.prompt_tokens + stats.new_tokens
                yield key, pieces, done
        before = done


def open_group(group: Sequence[EvaluatedModel]) -> OpenGroup:
    """Reads the models of a group."""
    first = group[0]
    adapted = [x for x in group if x.shares_base and x.step is not None]
    if not adapted:
        opened = open_for_answers(first)
        decoders = SlotDecoders(opened.model, opened.mesh)
        weights = opened.weights[first.name]
        return OpenGroup(decoders, weights, first.run.base.tokenizer, [])
    # A run knows its base better than anyone.
    of_folders = all(isinstance(x.run, FoundFolder) for x in adapted)
    base = first.run.base.name if of_folders else ""
    shared = open_for_answering([x.address for x in adapted], model=base)
    adapters = []
    for model, address in zip(adapted, shared.runs, strict=True):
        served, row = shared.read(address)
        adapters.append((model.name, row, served.identity))
    decoders = SlotDecoders(shared.model, shared.mesh)
    return OpenGroup(decoders, shared.params, shared.base.tokenizer, adapters)
