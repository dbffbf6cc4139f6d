"""A safetensors file that is filled tensor by tensor.

The format: the length of a header, the header in JSON, and the bytes of all tensors
(https://github.com/huggingface/safetensors). The library's own writer takes all
tensors at once.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from research.core.atomic_files import sync
from research.core.errors import UserError

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PIECE_BYTES = 16 * 2**20  # that are converted at a time


class SafetensorsWriter:
    """A new file; `add` must be called for every tensor, in the order of `shapes`.

    It is on the disk for good after the body of its `with` statement.

    Raises:
      OSError: the disk refuses.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        metadata: Mapping[str, str],
    ):
        """Writes the header.

        Args:
          path: of the file.
          shapes: of the tensors by name.
          dtype: of all of them, a key of `CODES`.
          metadata: texts that travel in the header.
        """
        self._path, self._dtype = path, np.dtype(jnp.dtype(dtype))
        self._waiting = dict(shapes)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * self._dtype.itemsize
            offsets = {"data_offsets": [begin, end]}
            header[name] = {"dtype": CODES[dtype], "shape": [*shape], **offsets}
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # Readers map the tensors behind it.
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Writes the next tensor.

        Raises:
          UserError: a number is not finite in the dtype of the file.
          OSError: the disk refuses.
        """
        expected, shape = next(iter(self._waiting.items()))
        if (name, tensor.shape) != (expected, shape):
            raise ValueError(f"{name}{tensor.shape} in the place of {expected}{shape}")
        del self._waiting[name]
        rows = tensor.reshape(1) if not shape else tensor
        step = max(1, PIECE_BYTES // max(1, rows[:1].nbytes))
        for begin in range(0, len(rows), step):
            piece = rows[begin : begin + step]
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(piece.astype(self._dtype))
            _require_finite(name, piece, stored)
            self._file.write(stored.view(np.uint8).data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
        except OSError:
            if error is None:  # Or else the same disk has refused before.
                raise
        if error is None and self._waiting:
            raise ValueError(f"{self._path} lacks {', '.join(self._waiting)}")
        if error is None:
            sync(self._path)


def _require_finite(name: str, tensor: np.ndarray, stored: np.ndarray) -> None:
    """Raises UserError: `stored`, which is `tensor` in the file's dtype, is not."""
    if np.isfinite(stored).all():
        return
    if np.isfinite(tensor).all():
        wider = "float32" if stored.dtype == jnp.bfloat16 else "bfloat16 or float32"
        raise UserError(
            f"{name} holds {float(np.abs(tensor).max()):g}, which is too large for "
            f"{stored.dtype}; export with --dtype={wider}"
        )
    raise UserError(
        f"{name} holds numbers that are not finite; export an earlier step with --step"
    )
