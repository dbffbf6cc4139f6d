"""Weights of a tiny model from its seed, alike in torch's environment and in ours.

They are not stored: only the names and shapes of tensors are. NumPy promises that
`RandomState` gives the same numbers in every release (NEP 19).
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

LINEAR_STD, EMBEDDING_STD, VECTOR_STD = 0.35, 0.5, 0.2
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "wpe")


def make_weights(
    shapes: Mapping[str, Sequence[int]], seed: int, norm_mean: float
) -> dict[str, np.ndarray]:
    """A float32 array for each tensor of a file; `norm_mean` is that of norms' scales.

    Attention picks out positions, and logits spread over several units.
    """
    weights = {}
    for name, shape in shapes.items():
        random = np.random.RandomState([seed, zlib.crc32(name.encode())])
        noise = random.standard_normal(shape)
        if len(shape) > 1:
            is_table = any(word in name for word in EMBEDDINGS)
            value = noise * (EMBEDDING_STD if is_table else LINEAR_STD)
        else:
            mean = 0.0 if name.endswith("bias") else norm_mean
            value = mean + VECTOR_STD * noise
        weights[name] = value.astype(np.float32)
    return weights
