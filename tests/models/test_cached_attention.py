"""A CPU attends group by group of rows: each row mixes what it sees, as elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import cached_attention
from research.models.attention import PLAIN, ScoreRule
from research.models.cached_attention import attend_cached

KV_HEADS, GROUP, WIDTH, ROOM = 2, 2, 8, 256


@pytest.mark.parametrize("rule", [PLAIN, ScoreRule(window=70)], ids=["all", "window"])
def test_rows_in_groups_mix_the_same_values_as_all_at_once(rule, monkeypatch):
    monkeypatch.setattr(cached_attention, "CPU_GROUP", 2)
    keys = jax.random.split(jax.random.key(0), 5)
    rows, slot = 4, 1
    slots = rows + slot

    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.float32)

    q = normal(keys[0], rows, 1, KV_HEADS * GROUP, WIDTH)
    new = [normal(key, rows, 1, KV_HEADS, WIDTH) for key in keys[1:3]]
    caches = [normal(key, 2, slots, KV_HEADS, ROOM, WIDTH) for key in keys[3:]]
    # The long rows are in one group alone.
    lengths = jnp.array([200, 139, 7, 0])
    given = (q, *new, *caches, jnp.int32(1), jnp.int32(slot), lengths, rule)
    found, *written = jax.jit(lambda *x: attend_cached(*x, platform="cpu"))(*given)
    wanted, *others = jax.jit(attend_cached)(*given)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, written, others)
