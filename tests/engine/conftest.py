"""A warm decoder with a bank, and the scores that its answers must have."""

import jax
import numpy as np
import pytest
from slot_answers import CHUNK, LENGTH, ROUNDS, SLOTS

from research.engine.slot_decoder import SlotDecoder
from research.weights.adapters import serving_bank


@pytest.fixture(scope="module")
def decoder(model, params):
    """Warm; nothing that a file does may trace a program again."""
    empty = serving_bank.bank(params, model.specs, adapters=3, rank=2)
    decoder = SlotDecoder(model, empty, SLOTS, LENGTH, chunk=CHUNK, rounds=ROUNDS)
    decoder.warm_up()
    traces = decoder.traces
    yield decoder
    assert decoder.traces == traces


@pytest.fixture(scope="session")
def full_scores(model, params):
    """Log-probabilities of the full forward pass after each id of a text."""
    at = np.arange(LENGTH)[None]

    @jax.jit
    def scores(tokens):
        hidden = model.hidden(params, tokens, at, np.ones_like(at))
        return jax.nn.log_softmax(model.logits(params, hidden), axis=-1)[0]

    def of(ids):
        return np.asarray(scores(np.pad(ids, (0, LENGTH - len(ids)))[None]))[: len(ids)]

    return of
