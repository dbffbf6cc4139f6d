"""Factors of adapters from a seed, alike in torch's environment and in ours.

They have few values, so that a compressed file of them is small.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def make_factors(
    shapes: Mapping[str, Sequence[int]], seed: int
) -> dict[str, np.ndarray]:
    """A float32 array for each name: multiples of 1/8 up to 1/4."""
    return {
        name: np.random.RandomState([seed, zlib.crc32(name.encode())])
        .randint(-2, 3, shape)
        .astype(np.float32)
        / 8
        for name, shape in shapes.items()
    }


def save_export(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes an adapter in little room: all numbers as one array."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: [*value.shape] for name, value in tensors.items()}
    text = json.dumps({"config": config, "shapes": shapes})
    (folder / "ours.json").write_text(text + "\n")
    numbers = np.concatenate([value.ravel() for value in tensors.values()])
    np.savez_compressed(folder / "ours.npz", numbers=numbers)


def read_export(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors that `save_export` wrote."""
    stored = json.loads((folder / "ours.json").read_text())
    with np.load(folder / "ours.npz") as arrays:
        numbers = arrays["numbers"]
    tensors, start = {}, 0
    for name, shape in stored["shapes"].items():
        end = start + math.prod(shape)
        tensors[name] = numbers[start:end].reshape(shape)
        start = end
    return stored["config"], tensors
