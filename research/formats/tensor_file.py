"""The interface of a file of tensors, whatever its format."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor


class TensorFile(Protocol):
    """Tensors under the names of the format; `fingerprint` is the files' sha256."""

    fingerprint: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One whole tensor."""
        ...

    def kind(self, name: str) -> str:
        """The numbers of a tensor: a dtype, or a kind of codes, such as `q8_0`."""
        ...

    def facts(self) -> Mapping[str, str]:
        """Texts by name that an export has put beside the tensors."""
        ...

    def layout(self, family: ModelFamily) -> tuple[StoredTensor, ...]:
        """How a model of `family` lies in files of this format."""
        ...

    def on(self, mesh: Mesh) -> "TensorFile":
        """The same tensors, where `mesh` has the devices that may compute them."""
        ...


class RowFile(TensorFile, Protocol):
    """A file whose tensors can also be read in parts."""

    def read_rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a tensor along its first axis; all of them are there."""
        ...


def fingerprint_files(files: list[Path]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
