"""Questions to a model and its answers as plain data, the same for everybody.

The terminal, the reports of a run, the evaluation and the server make a `Request` and
receive `Piece`s.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from research.core.errors import UserError

Finish = Literal["", "stop", "length", "cancelled", "error"]

# The most alternatives that a token's score can list, as in OpenAI's chat completions.
MOST_ALTERNATIVES = 20
# The most stop ids and biased ids of a request (300: as OpenAI's API reference).
MOST_STOP_IDS, MOST_BIASES = 32, 300


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The fields act in this order: penalties and bias on the logits, temperature, then
    top_k, top_p and min_p, each on what the one before has kept.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: draws from the smallest set of tokens that has this probability (nucleus
        sampling, Holtzman et al. 2020, arXiv:1904.09751); 1 draws from all tokens.
      top_k: draws from this many likeliest tokens (Fan et al. 2018, arXiv:1805.04833);
        0 draws from all tokens.
      min_p: drops tokens less likely than this share of the likeliest one (Nguyen et
        al. 2024, arXiv:2407.01082); 0 drops none.
      repetition_penalty: divides positive logits, and multiplies negative ones, of
        tokens that the prompt or the answer holds (Keskar et al. 2019,
        arXiv:1909.05858, section 4.1); 1 changes nothing.
      frequency_penalty: is subtracted from a token's logit once for each time that the
        answer holds it.
      presence_penalty: is subtracted once if the answer holds the token.
      logit_bias: is added to the logits of these ids.
      max_new_tokens: the longest answer, in tokens.
      min_new_tokens: no stop id is chosen before the answer has this many tokens.
      seed: of the random draws. Draw i depends on the seed and on i alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    seed: int = 0


class Constraint(Protocol):
    """A form that an answer must have; one object belongs to one request."""

    def allowed(self) -> np.ndarray:
        """The next tokens allowed: bits `[ceil(V / 32)]` of int32, id 0 lowest.

        Ids that end the answer are allowed where the answer may end.
        """
        ...

    def advance(self, token: int) -> bool:
        """Takes the chosen token; returns whether the answer must end after it."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, and how it is answered.

    Attributes:
      prompt: ids, at least one.
      sampling: how tokens are chosen, and how many at most.
      stop_ids: ids that end the answer. The id is in the answer's ids and scores, and
        never in its text.
      stop: texts that end the answer. Neither the text nor what follows is returned.
      adapter: name of a loaded adapter; "" is the base model.
      top_logprobs: gives each new token its log-probability and those of this many
        likeliest tokens, at most `MOST_ALTERNATIVES`; None gives no scores.
      echo: gives the scores of the prompt, too; needs `top_logprobs`.
      echo_from: the place in the prompt of the first score that `echo` gives. Keys
        of earlier ids may come from the prefix cache.
      constraint: a form that the answer must have; None allows every text.
      ignore_eos: `stop_ids` do not end the answer.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    adapter: str = ""
    top_logprobs: int | None = None
    echo: bool = False
    echo_from: int = 1
    constraint: Constraint | None = None
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """The score of one token in its place.

    Attributes:
      id: of the token.
      logprob: natural logarithm of its probability under the model itself: before
        temperature, penalties, bias and constraint.
      top: the likeliest ids there and their log-probabilities, the likeliest first. If
        `id` is among them, its value is `logprob`, to the last bit.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    All pieces together have every new id once, in order, and the whole text. A piece
    of ids whose text waits for the next ones has an empty text.

    Attributes:
      text: whole characters.
      ids: new ids.
      logprobs: one for each of `ids`, if scores were requested.
      finish: why the answer ends with this piece; "" if it does not.
      prompt_logprobs: on the first piece of a request with `echo`: the scores of
        `prompt[echo_from:]`. The first id of a prompt follows nothing and has none.
      cached_tokens: on the first piece: the prompt's tokens that were in the prefix
        cache.
      error: why an answer failed, with `finish` "error".
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenScore, ...] = ()
    finish: Finish = ""
    prompt_logprobs: tuple[TokenScore, ...] = ()
    cached_tokens: int = 0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts of an engine now, and since it began.

    Attributes:
      slots, running, waiting: slots, slots in use, requests in the queue.
      cache_tokens, cache_capacity: tokens in all slots, and the most there can be.
      prefix_bytes: of the blocks in the prefix cache.
      prefix_hits: tokens of prompts that were found in the prefix cache.
      adapter_rows: loaded adapters, the base not counted.
      prompt_tokens, new_tokens: of all requests that got a slot.
      finished: answers by the way they ended.
    """

    slots: int
    running: int
    waiting: int
    cache_tokens: int
    cache_capacity: int
    prefix_bytes: int
    prefix_hits: int
    adapter_rows: int
    prompt_tokens: int
    new_tokens: int
    finished: dict[str, int]


@dataclasses.dataclass(frozen=True)
class SlotStats:
    """The answer that a slot makes.

    Attributes:
      adapter: its name; "" is the base model.
      prompt_tokens, written_tokens: of the prompt, and how many are in the slot.
      cached_tokens: those of them that came from the prefix cache.
      new_tokens, most_new_tokens: of the answer, and the most that it may have.
    """

    adapter: str
    prompt_tokens: int
    written_tokens: int
    cached_tokens: int
    new_tokens: int
    most_new_tokens: int


class EngineFullError(UserError):
    """The queue has no room; the request may be sent again later.

    Attributes:
      retry_after: a guess of the seconds until there is room.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineStoppedError(UserError):
    """The device failed before, and nothing can be answered any longer."""


class OtherProcessError(UserError):
    """Another process cannot do what this one could; nothing has changed."""


class ContextOverflowError(UserError):
    """Prompt and answer together are longer than a slot."""


class UnknownAdapterError(UserError):
    """There is no adapter of this name."""


def check_request(request: Request, *, vocabulary: int, length: int) -> None:
    """Refuses what no slot could answer.

    Args:
      request: any.
      vocabulary: ids are below this.
      length: the most tokens that prompt and answer may have together.

    Raises:
      ContextOverflowError: they have more.
      UserError: a value is out of its range; the message begins with its name.
    """
    sampling, prompt = request.sampling, request.prompt
    if not prompt:
        raise UserError("prompt: it has no token; give at least one")
    _check_ids("prompt", prompt, vocabulary)
    stop_ids = () if request.ignore_eos else tuple(request.stop_ids)
    acting = [token for token, value in sampling.logit_bias.items() if value]
    _check_ids("stop_ids", stop_ids, vocabulary, MOST_STOP_IDS)
    _check_ids("logit_bias", acting, vocabulary, MOST_BIASES)
    alternatives = request.top_logprobs
    rules = (
        ("temperature", sampling.temperature, 0, float("inf")),
        ("top_p", sampling.top_p, 0, 1),
        ("top_k", sampling.top_k, 0, float("inf")),
        ("min_p", sampling.min_p, 0, 1),
        ("frequency_penalty", sampling.frequency_penalty, -2, 2),
        ("presence_penalty", sampling.presence_penalty, -2, 2),
        ("max_new_tokens", sampling.max_new_tokens, 0, float("inf")),
        ("min_new_tokens", sampling.min_new_tokens, 0, sampling.max_new_tokens),
        ("top_logprobs", alternatives or 0, 0, MOST_ALTERNATIVES),
        *(("logit_bias", value, -100, 100) for value in sampling.logit_bias.values()),
    )
    for name, value, low, high in rules:
        # A NaN is in no range.
        if not low <= value <= high or value == float("inf"):
            raise UserError(f"{name}: {value} is not in {low} to {high}")
    if not 0 < sampling.repetition_penalty < float("inf"):
        raise UserError(
            f"repetition_penalty: {sampling.repetition_penalty} is not above 0"
        )
    if sampling.top_p == 0:
        raise UserError("top_p: 0 keeps no token; 1 keeps all")
    if request.echo and alternatives is None:
        raise UserError("echo: scores of the prompt need top_logprobs")
    if request.echo_from < 1:
        raise UserError(f"echo_from: {request.echo_from} is not above 0")
    if request.constraint and (sampling.min_new_tokens or request.ignore_eos):
        name = "ignore_eos" if request.ignore_eos else "min_new_tokens"
        raise UserError(f"{name}: the required form decides where the answer ends")
    if any(not text for text in request.stop):
        raise UserError("stop: an empty text would end every answer")
    if len(prompt) + sampling.max_new_tokens > length:
        raise ContextOverflowError(
            f"{len(prompt)} prompt tokens and {sampling.max_new_tokens} new ones "
            f"exceed the context of {length}: shorten the prompt or max_new_tokens"
        )


def _check_ids(
    name: str, ids: Sequence[int], vocabulary: int, most: int | None = None
) -> None:
    if most is not None and len(ids) > most:
        raise UserError(f"{name}: {len(ids)} ids; at most {most} are possible")
    for token in ids:
        if not 0 <= token < vocabulary:
            raise UserError(f"{name}: id {token} is not in 0 to {vocabulary - 1}")
