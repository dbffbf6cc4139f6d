"""What a file of tensors offers, whatever its format."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class TensorFile(Protocol):
    """Tensors by Hugging Face name; `fingerprint` is the sha256 of the files."""

    fingerprint: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


def fingerprint_files(files: list[Path]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
