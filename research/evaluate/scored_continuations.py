"""How likely a model finds given continuations, through the engine that answers."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from research.engine.requests import Request, Sampling
from research.engine.text_generation import TextGenerator

# Continuations of one context share its keys and values.
PREFIX_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class ContinuationScore:
    """The score of one continuation.

    Attributes:
      logprob: the sum of the natural logarithms of its tokens' probabilities.
      is_greedy: whether each token is the likeliest one in its place.
      tokens: how many there are.
    """

    logprob: float
    is_greedy: bool
    tokens: int


def score_continuations(
    model: TextGenerator, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[ContinuationScore]:
    """Yields the score of each continuation after its context, in order.

    Args:
      model: scores them. Contexts that follow each other and begin with the same ids
        are read once.
      pairs: ids of a context, at least one, and ids of its continuation.

    Raises:
      UserError: a context is empty, or a pair is longer than the model's context.
    """
    requests = [
        Request(
            (*context, *continuation),
            Sampling(max_new_tokens=0),
            top_logprobs=1,
            echo=True,
            echo_from=len(context),
        )
        for context, continuation in pairs
    ]
    # One slot: a second one would read the same context before the first has stored it.
    for answer in model.in_order(requests, slots=1, prefix_bytes=PREFIX_BYTES):
        scores = next(iter(answer)).prompt_logprobs
        yield ContinuationScore(
            logprob=sum(score.logprob for score in scores),
            is_greedy=all(score.top[0][1] == score.logprob for score in scores),
            tokens=len(scores),
        )
