"""A tensor that a file holds in several parts, and the parts it is made of."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from research.core.errors import UserError
from research.weights.quantized.block_kind import BlockKind, CodedMatrix

AGAIN = "download or write the model again"
# Names of safetensors, and of NumPy.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """One tensor in several parts.

    Attributes:
      kind: the numbers, as `TensorFile.kind` names them.
      shape: of the whole.
      parts: names of the parts in the files.
      read: makes the whole.
      block_kind: the codes of a matrix `[out, in]`; None where it is no such matrix.
      codes: makes that.
    """

    kind: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    read: Callable[[], np.ndarray]
    block_kind: BlockKind | None = None
    codes: Callable[[], CodedMatrix] | None = None

    @classmethod
    def of_codes(
        cls,
        kind: BlockKind,
        shape: tuple[int, ...],
        parts: tuple[str, ...],
        codes: Callable[[], CodedMatrix],
    ) -> "PackedTensor":
        """A matrix whose codes are all that is read."""
        return cls(kind.name, shape, parts, lambda: codes().decode(), kind, codes)


@dataclasses.dataclass(frozen=True)
class StoredParts:
    """The tensors of a folder as they lie there.

    Attributes:
      folder: named in errors.
      shapes: by name.
      types: by name, as safetensors calls them.
      read: one tensor.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    read: Callable[[str], np.ndarray]

    def require(
        self,
        name: str,
        owner: str,
        types: Collection[str],
        shape: tuple[int, ...] | None = None,
    ) -> tuple[int, ...]:
        """The shape of the part `name` of `owner`.

        Raises:
          UserError: it is absent, or has another type or shape than these.
        """
        found = self.shapes.get(name)
        if found is None:
            raise self.damaged(f"{owner} lies in codes, and {name} is missing")
        if self.types[name] not in types:
            raise self.damaged(
                f"{name} is stored as {self.types[name]}, not {' or '.join(types)}"
            )
        if shape is not None and found != shape:
            raise self.damaged(f"{name} is {list(found)}, not {list(shape)}")
        return found

    def damaged(self, said: str) -> UserError:
        return UserError(f"{self.folder}: {said}; {AGAIN}")
