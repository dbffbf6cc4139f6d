"""A GGUF file of llama.cpp: its metadata, and its weights one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.formats.gguf.metadata_fields import read_architecture
from research.formats.gguf.rope_metadata import TABLES
from research.formats.tensor_file import fingerprint_files
from research.models.architecture import Architecture
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor


class GGUFFile:
    """An open file; tensors are dequantised as they are read.

    Its metadata stands in for a `config.json` and for a tokenizer's files.

    Raises:
      UserError: it is damaged, or no GGUF file.
    """

    def __init__(self, file: Path):
        import gguf

        try:
            reader = gguf.GGUFReader(file)
        except Exception as error:  # The reader raises whatever parsing runs into.
            raise UserError(f"{file} is not a GGUF file: {error}") from error
        self.metadata = {key: f.contents() for key, f in reader.fields.items()}
        self._file = file
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fingerprint = fingerprint_files([file])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every parameter; tables of rotary embeddings are none."""
        return {name: self._shape(name) for name in self._tensors if name not in TABLES}

    def _shape(self, name: str) -> tuple[int, ...]:
        # GGUF lists the fastest dimension first.
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{self._file}: {name} is stored as {tensor.tensor_type.name}, which "
                f"cannot be read ({error}); give the model as Q8_0, F16 or BF16"
            ) from error
        return values.reshape(self._shape(name))

    def layout(self, family: ModelFamily) -> tuple[StoredTensor, ...]:
        return family.gguf_tensors

    def on(self, mesh: Mesh) -> "GGUFFile":
        return self

    def read_architecture(self) -> Architecture:
        """The shape that the metadata describe.

        Raises:
          UserError: no family reads such files, a field is missing or malformed, or
            the model computes something that the Block does not.
        """
        return read_architecture(
            self.metadata,
            self.shapes(),
            {name: self.read(name) for name in TABLES if name in self._tensors},
            str(self._file),
        )
