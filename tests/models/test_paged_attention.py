"""The paged kernel of TPUs against the plain one; Pallas interprets it here.

`tests/plan/test_plan_tpu.py` compiles it for a TPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import in_soak
from jax.experimental.pallas import tpu as pltpu

from research.models.attention import ScoreRule
from research.models.cached_attention import attend_cached
from research.models.paged_attention import can_attend_pages

LAYERS, SLOTS, HEADS, KV_HEADS, ROOM, WIDTH = 2, 3, 4, 2, 256, 128


def cache(dtype=jnp.bfloat16, room=ROOM, width=WIDTH):
    return jnp.zeros((LAYERS, SLOTS, KV_HEADS, room, width), dtype)


@pytest.mark.parametrize("softcap", [0.0, in_soak(2.0)])
def test_the_kernel_attends_to_what_each_slot_holds(softcap):
    """Other layers and slots hold no number; rows have old tokens beyond their end."""
    rng = np.random.default_rng(5)
    layer, slot, lengths = np.int32(1), np.int32(1), np.array([130, 7])
    filled = np.arange(ROOM) < lengths[:, None]
    mine = np.zeros(cache().shape, bool)
    mine[layer, slot:] = True

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    def held():
        drawn = draw(*cache().shape)
        old = drawn.at[layer, slot:].multiply(
            jnp.where(filled, 1, 50)[:, None, :, None]
        )
        return jnp.where(mine, old, jnp.nan)

    new = draw(2, 1, HEADS, WIDTH), *(draw(2, 1, KV_HEADS, WIDTH) for _ in range(2))
    given = *new, held(), held(), layer, slot, lengths, ScoreRule(softcap=softcap)
    expected, *kept = attend_cached(*given)
    attend = jax.jit(functools.partial(attend_cached, platform="tpu"))
    with pltpu.force_tpu_interpret_mode():
        found, *same = attend(*given)
    found, expected, *caches = (
        np.asarray(x, np.float32) for x in (found, expected, *kept, *same)
    )
    assert found.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=0.02)
    np.testing.assert_array_equal(caches[:2], caches[2:])


def test_what_the_kernel_cannot_compute_stays_with_the_plain_one():
    def new(length=1, width=WIDTH, dtype=jnp.bfloat16):
        return jnp.zeros((2, length, HEADS, width), dtype)

    plain = ScoreRule()
    assert can_attend_pages(new(), cache(), plain)
    assert can_attend_pages(new(), cache(), ScoreRule(softcap=50.0))
    assert not can_attend_pages(new(), cache(), ScoreRule(window=16))
    assert not can_attend_pages(new(2), cache(), plain)
    assert not can_attend_pages(new(width=64), cache(width=64), plain)
    assert not can_attend_pages(new(), cache(room=192), plain)
    full = jnp.float32  # The kernel would round its products.
    assert not can_attend_pages(new(dtype=full), cache(full), plain)
