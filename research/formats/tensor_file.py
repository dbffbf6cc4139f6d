"""The interface of a file of tensors, whatever its format."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor
from research.weights.quantized.block_kind import BlockKind, CodedMatrix

PIECE = 1 << 24  # Numbers that are checked at once.


class TensorFile(Protocol):
    """Tensors under the names of the format.

    Attributes:
      place: the file or folder, as errors name it.
      fingerprint: sha256 of the files.
    """

    place: str
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


@runtime_checkable
class CodedFile(Protocol):
    """A `TensorFile` that may hold matrices in codes."""

    place: str

    def block_kind(self, name: str) -> BlockKind | None:
        """The codes of a tensor, whose rows are blocks; None if it has none."""
        ...

    def codes(self, name: str) -> CodedMatrix:
        """A tensor that has a `block_kind`, in its codes."""
        ...


def read_finite(tensors: TensorFile, name: str) -> np.ndarray:
    """One whole tensor.

    Raises:
      UserError: it has NaN or infinite values.
    """
    value = tensors.read(name)
    require_finite(tensors, name, value)
    return value


def require_finite(
    tensors: TensorFile | CodedFile, name: str, value: np.ndarray
) -> None:
    """Checks numbers of the tensor `name`.

    Raises:
      UserError: some are NaN or infinite. A model that has one answers nothing, and its
        loss would be NaN from the first step.
    """
    pieces = max(1, math.ceil(value.size / PIECE))
    for part in np.array_split(value, pieces) if value.ndim else [value]:
        # In two bytes NumPy needs several times as long.
        if not np.isfinite(part.astype(np.float32, copy=False)).all():
            raise UserError(
                f"{tensors.place}: {name} has values that are NaN or infinite; copy "
                "the model again, or take one that was saved before its training failed"
            )


def fingerprint_files(files: list[Path]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
