"""Both kinds of reference model share exact forward passes and robust greedy.

A test in another framework has to reach the same tokens despite float32 rounding, so
nothing is recorded whose two best logits are close.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

Arrays = dict[str, np.ndarray]

# Well above every tolerance that `make.py --check` allows.
MIN_MARGIN = 1e-2
MAX_ATTEMPTS = 64
GREEDY_STEPS = 32


def require(condition: bool, message: str) -> None:
    """Raise RuntimeError with the message unless the condition holds."""
    if not condition:
        raise RuntimeError(message)


@torch.no_grad()
def forward(model: PreTrainedModel, tokens: np.ndarray) -> torch.Tensor:
    """Logits, float32 [batch, length, vocabulary], of token ids [batch, length]."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return model(input_ids=ids, use_cache=False).logits


def margin(logits: torch.Tensor) -> float:
    """Least difference between the best and second best logit at any position."""
    best = logits.topk(2, dim=-1).values
    return float((best[..., 0] - best[..., 1]).min())


def greedy(model: PreTrainedModel, prompt: np.ndarray) -> tuple[float, np.ndarray]:
    """Least margin and the int32 [1, 32] tokens that follow a [1, length] prompt.

    Every step is a whole forward pass: no cache, no end-of-sequence stop.
    """
    ids, least = prompt, math.inf
    for _ in range(GREEDY_STEPS):
        last = forward(model, ids)[:, -1]
        least = min(least, margin(last))
        ids = np.concatenate([ids, last.argmax(-1, keepdim=True).int().numpy()], axis=1)
    return least, ids[:, prompt.shape[1] :].astype(np.int32)


def first_robust(attempt: Callable[[int], tuple[float, Arrays]]) -> Arrays:
    """The first numbered attempt whose margin is wide enough.

    Raises:
        RuntimeError: no attempt was.
    """
    for index in range(MAX_ATTEMPTS):
        least, arrays = attempt(index)
        if least > MIN_MARGIN:
            return arrays
    raise RuntimeError(f"no margin above {MIN_MARGIN} in {MAX_ATTEMPTS} attempts")


def continue_prompt(
    model: PreTrainedModel, make_prompt: Callable[[int], np.ndarray]
) -> Arrays:
    """`prompt` and its `greedy` continuation for the first robust prompt made."""

    def attempt(index: int) -> tuple[float, Arrays]:
        prompt = make_prompt(index).astype(np.int32)
        least, tokens = greedy(model, prompt)
        # A short loop would hide most mistakes in the cached decoding it has to test.
        if len(np.unique(tokens)) < GREEDY_STEPS // 4:
            least = 0.0
        return least, {"prompt": prompt, "greedy": tokens}

    return first_robust(attempt)
