"""Sizes of the slots, prompts and ways to draw that the tests of the engine share."""

import numpy as np
from helpers import TINY

from research.engine.requests import Sampling

SLOTS, LENGTH, CHUNK, ROUNDS = 4, 150, 8, 2
RNG = np.random.default_rng(0)
SHORT, MIDDLE, LONG = (
    tuple(RNG.integers(0, TINY.vocab, n).tolist()) for n in (1, 20, 90)
)
GREEDY = Sampling(max_new_tokens=12)
# Uses every step of `token_choice`, with penalties and bias that change the answer.
DRAWN = Sampling(
    temperature=1.5, top_p=0.97, top_k=60, min_p=0.001, repetition_penalty=1.3,
    frequency_penalty=0.4, presence_penalty=0.2, logit_bias={3: 2.0, 95: -3.0},
    max_new_tokens=12, min_new_tokens=3, seed=2**40 + 7,
)  # fmt: skip
