"""Rows of random tokens that both sides of a benchmark draw alike.

NumPy alone: the interpreter of the other side has no JAX, and this one no torch.
"""

import numpy as np


def random_rows(
    shape: tuple[int, int], vocab: int, trained: float = 1.0, documents: int = 1
) -> dict[str, np.ndarray]:
    """`tokens`, `targets`, `weights`, `segments` and `positions`, each `[rows, seq]`.

    Args:
      shape: rows, and tokens of each.
      vocab: ids are drawn below it.
      trained: share of the positions with a next token that carry a loss.
      documents: of each row, equally long; the last token of one has no next token.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, shape, np.int32)
    index = np.arange(shape[1])
    # The last document is the shorter one where they do not divide the row.
    number, position = np.divmod(index, -(-shape[1] // documents))
    has_next = np.append(number[1:] == number[:-1], False)
    weights = (rng.random(shape) < trained) & has_next
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": weights.astype(np.float32),
        "segments": np.broadcast_to(number + 1, shape).astype(np.int32),
        "positions": np.broadcast_to(position, shape).astype(np.int32),
    }
