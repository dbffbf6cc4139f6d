"""The choice of tokens against plain NumPy, and what odd settings do."""

import dataclasses

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.engine.requests import MOST_STOP_IDS, Sampling
from research.engine.token_choice import (
    choice_row,
    choose,
    log_probabilities,
)

ROWS, VOCAB = 4096, 96
RNG = np.random.default_rng(3)
LOGITS = RNG.normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
PROMPT, STOP = range(0, 60, 2), (5, 9, 95)
pick = jax.jit(choose)


def state(sampling, **changes):
    """Rows of equal settings; `changes` are arrays that differ."""
    row = choice_row(sampling, STOP, PROMPT, VOCAB)
    whole = jax.tree.map(lambda x: np.broadcast_to(x, (ROWS, *np.shape(x))), row)
    return dataclasses.replace(whole, **changes)


def chosen(state, logits=LOGITS, number=0):
    numbers = np.broadcast_to(np.int32(number), ROWS)
    return np.asarray(pick(state, logits, numbers, np.ones(ROWS, bool)))


def test_penalties_and_bias_change_logits_as_their_sources_say():
    counts = RNG.integers(0, 3, LOGITS.shape).astype(np.int32)
    bias = {3: 1.5, 95: -4.0}
    sampling = Sampling(
        repetition_penalty=1.4, frequency_penalty=0.7, presence_penalty=-0.5,
        logit_bias=bias,
    )  # fmt: skip
    held = (counts > 0) | np.isin(np.arange(VOCAB), PROMPT)
    expected = np.where(LOGITS > 0, LOGITS / 1.4, LOGITS * 1.4)
    expected = np.where(held, expected, LOGITS) - 0.7 * counts + 0.5 * (counts > 0)
    for token, value in bias.items():
        expected[:, token] += value
    found = chosen(state(sampling, counts=counts))
    np.testing.assert_array_equal(found, expected.argmax(-1))
    assert (found != LOGITS.argmax(-1)).any()


def test_no_stop_id_is_chosen_early_and_none_that_a_constraint_forbids():
    early = LOGITS.copy()
    early[:, STOP] = -np.inf
    sampling = Sampling(min_new_tokens=4)
    np.testing.assert_array_equal(chosen(state(sampling), number=3), early.argmax(-1))
    found = chosen(state(sampling), number=4)
    np.testing.assert_array_equal(found, LOGITS.argmax(-1))
    allowed = RNG.random(LOGITS.shape) < 0.3
    allowed[0], allowed[0, 95] = False, True
    bits = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
    masked = state(sampling, constrained=np.ones(ROWS, bool), allowed=bits)
    expected = np.where(allowed, early, -np.inf).argmax(-1)
    # Where nothing else is allowed, even a stop id that comes early.
    expected[0] = 95
    np.testing.assert_array_equal(chosen(masked), expected)


def kept_by(sampling, logits):
    """The probabilities of the tokens that may be drawn, by sorting."""
    logits = logits / sampling.temperature
    order = np.argsort(-logits)
    p = np.exp(logits - logits.max())
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.3),
        Sampling(temperature=0.7, top_k=7),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=1.6, top_k=40, top_p=0.9, min_p=0.05),
    ],
    ids=["all", "top_k", "top_p", "min_p", "together"],
)
def test_tokens_are_drawn_by_their_probabilities(sampling):
    logits = np.broadcast_to(LOGITS[0], LOGITS.shape)
    found = chosen(state(sampling), logits, np.arange(ROWS))
    counts, p = np.bincount(found, minlength=VOCAB), kept_by(sampling, LOGITS[0])
    assert not counts[p == 0].any()
    # Pearson's statistic, of the likelier tokens: mean n, variance 2n.
    often = p * ROWS > 5
    n = often.sum()
    off = ((counts - p * ROWS) ** 2)[often] / (p * ROWS)[often]
    assert off.sum() < n + 5 * np.sqrt(2 * n)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=0.0),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=1e-30),
    ],
)
def test_the_likeliest_token_is_always_kept(sampling):
    np.testing.assert_array_equal(chosen(state(sampling)), LOGITS.argmax(-1))


def test_draws_depend_on_the_seed_and_the_number_alone():
    logits = np.broadcast_to(LOGITS[0], LOGITS.shape)
    seeds = (1, 1, 2, 2**32 + 1, -1)
    of = {
        seed: chosen(state(Sampling(1.0, seed=seed)), logits, np.arange(ROWS))
        for seed in seeds
    }
    assert len({x.tobytes() for x in of.values()}) == len(of) == 4
    again = chosen(state(Sampling(1.0, seed=1)), logits, np.arange(ROWS)[::-1])
    np.testing.assert_array_equal(again[::-1], of[1])


def test_a_model_that_gives_no_numbers_gives_some_id():
    found = chosen(state(Sampling()), np.full_like(LOGITS, np.nan))
    assert ((found >= 0) & (found < VOCAB)).all()


def test_scores_are_those_of_the_model_itself():
    ids = RNG.integers(0, VOCAB, ROWS)
    own, top_ids, top = jax.jit(log_probabilities)(LOGITS, ids, True)
    wide = LOGITS.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(own, expected[np.arange(ROWS), ids], atol=1e-5)
    np.testing.assert_array_equal(top_ids, np.argsort(-LOGITS, axis=-1)[:, :20])
    same = np.asarray(top_ids) == ids[:, None]
    np.testing.assert_array_equal(np.asarray(top)[same], own[same.any(-1)])
    assert same.any() and not np.any(jax.jit(log_probabilities)(LOGITS, ids, False)[2])


@pytest.mark.parametrize(
    "sampling, stop, said",
    [
        (Sampling(), range(MOST_STOP_IDS + 1), "stop_ids: 33 ids; at most 32"),
        (Sampling(), [96], r"stop_ids: ids \[96\] are not all in \[0, 96\)"),
        (Sampling(logit_bias={-1: 1.0}), [], r"logit_bias: ids \[-1\] are not all"),
        (Sampling(logit_bias=dict.fromkeys(range(301), 1.0)), [], "at most 300"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sampling, stop, said):
    with pytest.raises(UserError, match=said):
        choice_row(sampling, stop, (), VOCAB)
