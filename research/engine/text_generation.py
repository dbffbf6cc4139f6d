"""Text from parameters: a sampler, a tokenizer, and pieces of text as they come."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from research.engine.requests import Sampling
from research.engine.sampler import Sampler
from research.formats.base_model import Base
from research.formats.load_parameters import load_base
from research.tokenize.tokenizer import Tokenizer
from research.weights.trainable import Trainable

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TextGenerator:
    """Answers prompts.

    Attributes:
      sampler: of the model.
      params: of the model, by path; a matrix may carry an adapter.
      tokenizer: of the model's ids.
    """

    sampler: Sampler
    params: Params
    tokenizer: Tokenizer

    def stream(
        self, prompt: Sequence[int], sampling: Sampling, stop_ids: frozenset[int]
    ) -> Iterator[str]:
        """Yields the answer to the ids of `prompt` in pieces of whole characters.

        Raises:
          UserError: prompt and answer exceed the model's context.
        """
        ids = self.sampler.stream(self.params, prompt, sampling, stop_ids)
        return stream_text(ids, self.tokenizer)

    def answer(
        self, prompt: Sequence[int], sampling: Sampling, stop_ids: frozenset[int]
    ) -> str:
        """Returns the whole answer to the ids of `prompt`."""
        return "".join(self.stream(prompt, sampling, stop_ids))


def tuned_generator(
    sampler: Sampler,
    trainable: Trainable,
    params: Params,
    frozen: Params,
    tokenizer: Tokenizer,
) -> TextGenerator:
    """Generates with the trained parameters `params` over the `frozen` ones.

    They are used as they are. A copy in the compute dtype would be faster to read, and
    might not fit beside the state of a run that is training.
    """
    return TextGenerator(sampler, trainable.forward(params, frozen, None), tokenizer)


def base_generator(
    sampler: Sampler, base: Base, mesh: Mesh, frozen: Params
) -> TextGenerator | None:
    """Generates with the base model: the `frozen` parameters, or the base read again.

    Returns None if training began with random parameters.
    """
    if base.tensors is None:
        return None
    dtype = sampler.model.options.dtype
    weights = frozen or load_base(base, sampler.model, mesh, dtype, seed=0)
    return TextGenerator(sampler, weights, base.tokenizer)


def stream_text(ids: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields text as ids come; a character waits until all its ids are there."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        shown = text
    rest = tokenizer.decode(seen)
    if len(rest) > len(shown):
        yield rest[len(shown) :]
