"""Autoregressive decoding: one prefill of the prompt, then one token at a time."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UserError
from research.engine.requests import Sampling
from research.models.transformer import Cache, Model

Array = jax.Array

# Prompts and caches are padded to multiples of these, so that few lengths compile.
PROMPT_BUCKET = 64
CACHE_BUCKET = 256


class Sampler:
    """Streams token ids from a model. Each shape compiles once.

    Attributes:
      model: the decoder; parameters are passed to each call.
    """

    def __init__(self, model: Model):
        self.model = model
        self._prefill = jax.jit(functools.partial(_prefill, model))
        self._advance = jax.jit(functools.partial(_advance, model), donate_argnums=2)

    def stream(
        self,
        params: dict[str, Any],
        prompt: Sequence[int],
        sampling: Sampling,
        stop_ids: frozenset[int],
    ) -> Iterator[int]:
        """Yields new ids until one of `stop_ids`, which is not yielded, or the limit.

        Args:
          params: of the model, by path, on one device or sharded.
          prompt: ids.
          sampling: how ids are chosen, and how many at most.
          stop_ids: ids that end the answer.

        Raises:
          UserError: prompt and answer exceed the model's context.
        """
        longest = self.model.architecture.max_position
        if len(prompt) + sampling.max_new_tokens > longest:
            raise UserError(
                f"{len(prompt)} prompt tokens and {sampling.max_new_tokens} new ones "
                f"exceed the model's context of {longest}"
            )
        padded = _round_up(len(prompt), PROMPT_BUCKET)
        room = _round_up(padded + sampling.max_new_tokens, CACHE_BUCKET)
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, : len(prompt)] = prompt
        cache = self.model.init_cache(1, room)
        logits, cache = self._prefill(params, tokens, cache, len(prompt))
        key = jax.random.key(sampling.seed)
        for index in range(sampling.max_new_tokens):
            token = choose(logits, sampling, jax.random.fold_in(key, index))
            if int(token[0]) in stop_ids:
                return
            yield int(token[0])
            logits, cache = self._advance(params, token, cache)


def choose(logits_BV: Array, sampling: Sampling, key: Array) -> Array:
    """Chooses the next ids `[B]` from float32 logits `[B, V]`."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits_BV, axis=-1)[:, ::-1]
        above = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # `before` excludes a token's own probability, so the likeliest always stays.
        before = above - jax.nn.softmax(ordered, axis=-1)
        kept = jnp.where(before < sampling.top_p, ordered, jnp.inf)
        threshold = jnp.min(kept, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= threshold, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV, axis=-1)


def _round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def _prefill(
    model: Model, params: dict[str, Any], tokens_BT: Array, cache: Cache, length: Array
) -> tuple[Array, Cache]:
    """Logits `[B, V]` after the first `length` tokens, and the cache.

    The cache counts `length` slots as filled; later tokens overwrite the padding.
    """
    hidden, cache = model.decode(params, tokens_BT, cache)
    last = jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False)
    logits = model.logits(params, last)
    return logits, dataclasses.replace(
        cache, length=jnp.full_like(cache.length, length)
    )


def _advance(
    model: Model, params: dict[str, Any], token_B: Array, cache: Cache
) -> tuple[Array, Cache]:
    hidden, cache = model.decode(params, token_B[:, None], cache)
    return model.logits(params, hidden[:, 0]), cache
