"""A model that answers: parameters of a definition, a sampler, text as it comes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from research.engine.sampler import Sampler, Sampling
from research.formats.base_model import Base
from research.tokenize.tokenizer import Tokenizer
from research.train.step.definition_from_config import load_base
from research.train.step.train_step import StepDefinition

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters to sample from, and the tokenizer of their ids."""

    sampler: Sampler
    params: Params
    tokenizer: Tokenizer

    def stream(
        self, prompt: Sequence[int], sampling: Sampling, stop_ids: frozenset[int]
    ) -> Iterator[str]:
        """The answer to the ids of `prompt`, piece by piece."""
        ids = self.sampler.stream(self.params, prompt, sampling, stop_ids)
        return stream_text(ids, self.tokenizer)

    def answer(
        self, prompt: Sequence[int], sampling: Sampling, stop_ids: frozenset[int]
    ) -> str:
        """The whole answer."""
        return "".join(self.stream(prompt, sampling, stop_ids))


def tuned_model(
    definition: StepDefinition,
    base: Base,
    sampler: Sampler,
    params: Params,
    frozen: Params,
) -> Model:
    """The model as trained so far, in the model's compute dtype."""
    weights = definition.trainable.forward(params, frozen, None)
    if not frozen:
        dtype = definition.model.options.dtype
        weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    return Model(sampler, weights, base.tokenizer)


def base_model(
    definition: StepDefinition, base: Base, sampler: Sampler, frozen: Params
) -> Model | None:
    """The model it started from: what is frozen, or read again where nothing is.

    None where there was none: the weights began at random.
    """
    if base.tensors is None:
        return None
    weights = frozen or load_base(definition, base, definition.model.options.dtype)
    return Model(sampler, weights, base.tokenizer)


def stream_text(ids: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of text as ids come; waits until a character is whole."""
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
