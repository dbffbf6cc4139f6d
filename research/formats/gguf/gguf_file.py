"""A GGUF file of llama.cpp: its metadata, and its weights one tensor at a time."""

import functools
import itertools
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.formats.gguf.block_layouts import LAYOUTS, unpack_blocks
from research.formats.gguf.metadata_fields import read_architecture
from research.formats.gguf.rope_metadata import TABLES
from research.formats.gguf.tensor_types import TYPES
from research.formats.tensor_file import fingerprint_files
from research.models.architecture import Architecture
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor
from research.weights.quantized.block_kind import BlockKind, CodedMatrix

MAGIC = b"GGUF"
PIECE = 2**22  # numbers of a tensor that are read at a time
AT_ONCE = 2**17  # numbers that are dequantised at a time, which a cache holds
LONG_ROWS = 16
HALVES = {"F16": np.float16, "BF16": jnp.bfloat16}
FACTS = "research."  # Keys of texts that an export puts into a file begin so.


class GGUFFile:
    """An open file; tensors are dequantised as they are read.

    Its metadata stands in for a `config.json` and for a tokenizer's files.

    Args:
      file: the whole file.
      kind: what it must hold, as in `general.type`: a `model`, or an `adapter`.

    Raises:
      UserError: it is damaged, or holds something else.
    """

    def __init__(self, file: Path, kind: str = "model"):
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{file} is not a GGUF file: it does not begin as one")
        try:
            reader = _open_strictly(file)
            self.metadata = {key: f.contents() for key, f in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._mapped = reader.data
            self._refuse_overlaps()
        except Exception as error:  # The reader raises whatever parsing runs into.
            raise UserError(
                f"{file} is damaged: {error}; download or write it again"
            ) from error
        self._file, self.place = file, str(file)
        self._refuse_parts(kind)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the file; the first use reads it."""
        return fingerprint_files([self._file])

    def _refuse_overlaps(self) -> None:
        """Each tensor has bytes of its own; a wrong offset would give another's."""
        ordered = sorted(self._tensors.values(), key=lambda tensor: tensor.data_offset)
        for one, other in itertools.pairwise(ordered):
            if one.data_offset + one.n_bytes > other.data_offset:
                raise ValueError(f"{one.name} and {other.name} share bytes")

    def _refuse_parts(self, kind: str) -> None:
        found = self.metadata.get("general.type", "model")
        if found != kind:
            raise UserError(
                f"{self._file} holds no {kind}: its general.type is {found!r}; give "
                f"the file of the whole {kind}"
            )
        parts = self.metadata.get("split.count", 0)
        if parts not in (0, 1):
            raise UserError(
                f"{self._file} is one of {parts} parts of a model; join them with "
                "llama-gguf-split --merge, and give the joined file"
            )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every parameter; tables of rotary embeddings are none."""
        return {name: self._shape(name) for name in self._tensors if name not in TABLES}

    def _shape(self, name: str) -> tuple[int, ...]:
        # GGUF lists the fastest dimension first.
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        shape, value = self._shape(name), None
        if math.prod(shape) <= PIECE:
            return self.read_rows(name, slice(None)).reshape(shape)
        step = max(1, PIECE * shape[0] // math.prod(shape))
        for begin in range(0, shape[0], step):
            part = self.read_rows(name, slice(begin, begin + step))
            if value is None:
                value = np.empty(shape, part.dtype)
            value[begin : begin + step] = part
        assert value is not None, name
        return value

    def read_rows(self, name: str, rows: slice) -> np.ndarray:
        tensor = self._tensors[name]
        stored, kind = tensor.data[rows], tensor.tensor_type
        if stored.ndim > 1 and kind.name in HALVES:  # As exact, and half as large.
            values = np.array(stored).view(np.dtype(HALVES[kind.name]))
        else:
            try:
                values = _dequantize(np.asarray(stored).view(np.ndarray), kind)
            except (NotImplementedError, ValueError) as error:
                raise UserError(
                    f"{self._file}: {name} is stored as {kind.name}, which cannot be "
                    f"read ({error}); give the model as F32, F16, BF16 or "
                    f"{', '.join(LAYOUTS)}"
                ) from error
        # Pages that were read would stay in the memory of the process.
        self._mapped._mmap.madvise(mmap.MADV_DONTNEED)
        return values.reshape(-1, *self._shape(name)[1:])

    def block_kind(self, name: str) -> BlockKind | None:
        layout = LAYOUTS.get(self._tensors[name].tensor_type.name)
        return layout.kind if layout else None

    def codes(self, name: str) -> CodedMatrix:
        tensor = self._tensors[name]
        rows = np.array(tensor.data).reshape(*self._shape(name)[:-1], -1)
        self._mapped._mmap.madvise(mmap.MADV_DONTNEED)
        return unpack_blocks(LAYOUTS[tensor.tensor_type.name], rows)

    def kind(self, name: str) -> str:
        found = self._tensors[name].tensor_type.name
        return {own: name for name, own in TYPES.items()}.get(found, found)

    def facts(self) -> Mapping[str, str]:
        return {
            key.removeprefix(FACTS): str(value)
            for key, value in self.metadata.items()
            if key.startswith(FACTS)
        }

    def layout(self, family: ModelFamily) -> tuple[StoredTensor, ...]:
        return family.gguf_layout(self._tensors)

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


def _dequantize(stored: np.ndarray, kind: Any) -> np.ndarray:
    """The numbers of rows of bytes, in float32 and in order.

    Codes give `[blocks, weights of a block]`, and plain numbers their stored shape.
    The library takes 16 rows at a time, which for a matrix are so few numbers that most
    of the time goes into calls. Blocks are therefore regrouped into 16 long rows.
    """
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    if block == 1:
        return np.array(gguf.dequantize(stored, kind), np.float32)
    blocks = stored.reshape(-1, size)
    values = np.empty((len(blocks), block), np.float32)
    step = max(LONG_ROWS, AT_ONCE // block)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        rows = LONG_ROWS if len(part) % LONG_ROWS == 0 else 1
        found = gguf.dequantize(part.reshape(rows, -1), kind)
        values[start : start + step] = found.reshape(-1, block)
    return values


def _open_strictly(file: Path) -> Any:
    """A reader that stops where the file does, and reads long lists at once.

    That of the library reads nothing behind the end, for as many times as the file
    says that something comes; and it takes a minute for the tokens of Gemma. Its public
    methods all come after both, so two private ones are replaced.
    """
    import gguf

    class StrictReader(gguf.GGUFReader):
        def _get(
            self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None
        ) -> np.ndarray:
            self._check_end(int(offset) + np.dtype(dtype).itemsize * int(count))
            return super()._get(offset, dtype, count, override_order)

        def _check_end(self, end: int) -> None:
            if end > len(self.data):
                raise ValueError(
                    f"it ends at byte {len(self.data)}, and announces more"
                )

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            kinds = gguf.GGUFValueType
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = self._get(orig_offs, np.uint32)
            count = self._get(orig_offs + 4, np.uint64)
            types, start = [kinds.ARRAY, kinds(kind[0])], orig_offs + 12
            if types[1] == kinds.STRING:
                end, texts = self._texts(start, int(count[0]))
                indices = [*range(2, 2 + len(texts))]
                return end - orig_offs, [kind, count, *texts], indices, types
            values = self._get(start, self.gguf_scalar_to_np[types[1]], count[0])
            return 12 + values.nbytes, [kind, count, values], [2], types

        def _texts(self, at: int, count: int) -> tuple[int, list[memoryview]]:
            length = struct.Struct(">Q" if self.byte_order == "S" else "<Q")
            content, texts = memoryview(self.data), []
            for _ in range(count):
                self._check_end(at + length.size)
                end = at + length.size + length.unpack_from(content, at)[0]
                self._check_end(end)
                texts.append(content[at + length.size : end])
                at = end
            return at, texts

    return StrictReader(file)
