"""Writes a GGUF file tensor by tensor; a host holds one of them at a time."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from research.core.atomic_files import sync
from research.formats.gguf.tensor_types import (
    file_type,
    stored_bytes,
    tensor_type,
    to_type,
)

PIECE = 2**22  # numbers of a tensor that are converted at a time


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is made when its turn comes.

    Attributes:
      name: in the file.
      shape: slowest axis first.
      make: gives its numbers. Every process calls it.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_gguf(
    file: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[PlannedTensor],
    wanted: str,
) -> None:
    """Writes one file; every process must call it, and the first one writes.

    Args:
      file: that there is not yet. It is whole only when this returns, so the caller
        gives it its final name afterwards.
      metadata: all keys but those of types of tensors: bool, int, float, text, or a
        list of one of these.
      tensors: in the order of the file.
      wanted: the type of its matrices, one of `tensor_types.TYPES`.

    Raises:
      UserError: a number is not finite, or too large for its type.
      OSError: the disk refuses.
    """
    if jax.process_index() != 0:
        for tensor in tensors:
            tensor.make()
        return
    import gguf

    types = [tensor_type(t.name, t.shape, wanted) for t in tensors]
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    own = dict(metadata)
    writer = gguf.GGUFWriter(None, own.pop("general.architecture"))
    _add_metadata(writer, own)
    writer.add_file_type(file_type(wanted))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor, kind in zip(tensors, types, strict=True):
        size = stored_bytes(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, size, kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    # The library would take each tensor as a whole, in the bytes of its type.
    with file.open("ab") as data:
        _pad(data, writer.data_alignment)
        for tensor, kind in zip(tensors, types, strict=True):
            _write_tensor(data, tensor, kind)
            _pad(data, writer.data_alignment)
    sync(file)


def _write_tensor(data: BinaryIO, tensor: PlannedTensor, kind: Any) -> None:
    value = tensor.make()
    assert value.shape == tensor.shape, tensor.name
    step = max(1, PIECE // max(1, math.prod(tensor.shape[1:])))
    for begin in range(0, len(value), step):
        data.write(to_type(tensor.name, value[begin : begin + step], kind).data)


def _pad(data: BinaryIO, alignment: int) -> None:
    data.write(b"\0" * (-data.tell() % alignment))


def _add_metadata(writer: Any, metadata: Mapping[str, Any]) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        adders[type(value)](key, value)
