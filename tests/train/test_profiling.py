"""A trace holds the steps that were asked for, and no other."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from research.config.run_config import RuntimeConfig
from research.train.metrics.profiling import trace_steps


def traced_steps(folder):
    """Numbers of the steps in the one trace below `folder`."""
    (packed,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    assert list(packed.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(packed.read_bytes()))["traceEvents"]
    steps = (event for event in events if event.get("name") == "train")
    return sorted(int(event["args"]["step_num"]) for event in steps)


def asked(begin, count):
    return RuntimeConfig(profile_from=begin, profile_steps=count)


@pytest.fixture
def step_fn():
    return jax.jit(lambda state, batch: (state + batch, {"loss": state}))


def train(step_fn, first, total):
    state = jnp.float32(first)
    for _ in range(first, total):
        state, _ = step_fn(state, jnp.float32(1))
    assert state == total


@pytest.mark.parametrize("first", [0, 2], ids=["fresh", "resumed"])
def test_the_steps_asked_for_are_traced(step_fn, tmp_path, first):
    with trace_steps(step_fn, tmp_path, first, asked(4, 2)) as traced:
        train(traced, first, 8)
    assert traced_steps(tmp_path) == [4, 5]


def test_a_run_that_stops_early_keeps_what_it_has_seen(step_fn, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        trace_steps(step_fn, tmp_path, 0, asked(2, 9)) as traced,
    ):
        train(traced, 0, 4)
        raise KeyboardInterrupt
    assert traced_steps(tmp_path) == [2, 3, 4]


@pytest.mark.parametrize("first, begin", [(0, 0), (5, 3), (0, 99)])
def test_nothing_is_written_where_no_step_is_asked_for(step_fn, tmp_path, first, begin):
    """None, one of a run before, or one that is never made."""
    with trace_steps(step_fn, tmp_path, first, asked(begin, 2)) as traced:
        train(traced, first, 8)
    assert not list(tmp_path.iterdir())
