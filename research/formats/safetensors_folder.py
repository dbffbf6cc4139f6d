"""A Hugging Face folder of safetensors files, read one tensor at a time."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from research.core.errors import UserError
from research.formats.tensor_file import fingerprint_files


class SafetensorsFolder:
    """The `*.safetensors` of a Hugging Face folder, one file or an index of many."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = json.loads(index.read_text())["weight_map"].values()
                files = [folder / name for name in sorted(set(names))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is not an index: {error!r}") from error
        else:
            files = sorted(folder.glob("*.safetensors"))
        missing = [file.name for file in files if not file.is_file()]
        if not files or missing:
            what = f"lacks {', '.join(missing)}" if missing else "has no .safetensors"
            pickled = " (pickled .bin weights are never read)"
            raise UserError(
                f"{folder} {what}{pickled if list(folder.glob('*.bin')) else ''}"
            )
        self._handles = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except Exception as error:  # SafetensorError, or what mmap says.
                raise UserError(f"{file} is not a safetensors file: {error}") from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))
        self.fingerprint = fingerprint_files(files)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            name: tuple(handle.get_slice(name).get_shape())
            for name, handle in self._handles.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)
