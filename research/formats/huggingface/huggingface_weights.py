"""The config and weights of a Hugging Face folder, read one tensor at a time."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.core.json_files import read_json
from research.formats.tensor_file import fingerprint_files
from research.models.architecture import Architecture
from research.models.families.family_registry import from_hf_config
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor

PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


def read_hf_config(folder: Path) -> Architecture:
    """The shape that the folder's `config.json` describes.

    Raises:
      UserError: it is absent, damaged, or describes a model of no known family.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json")
    config = read_json(file, dict, "give the file of the model")
    return from_hf_config(config, str(file))


def read_licence(folder: Path) -> str:
    """The licence that the model card of the folder names; empty without one."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    head = card.split("---", 2)[1] if card.startswith("---") else ""
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", head, re.MULTILINE)
    return found[1] if found else ""


def has_weights(folder: Path) -> bool:
    """Whether the folder has every file of weights that it should have."""
    try:
        return bool(_weight_files(folder))
    except UserError:
        return False


class HuggingFaceWeights:
    """The `*.safetensors` of a Hugging Face folder: one file, or an index of many.

    Raises:
      UserError: there are none, or one is missing or damaged.
    """

    def __init__(self, folder: Path):
        from safetensors import safe_open

        files = _weight_files(folder)
        self._handles = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except Exception as error:  # SafetensorError, or an error of mmap.
                raise UserError(f"{file} is not a safetensors file: {error}") from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))
        self._refuse_quantised(folder)
        self.fingerprint = fingerprint_files(files)

    def _refuse_quantised(self, folder: Path) -> None:
        """A checkpoint can hold codes for weights without a word in its config."""
        for name, handle in self._handles.items():
            kind = handle.get_slice(name).get_dtype()
            if name.endswith(".weight") and kind not in PLAIN_TYPES:
                raise UserError(
                    f"{folder}: {name} is stored as {kind}, so the weights are "
                    "quantised; give the model as it was before, in float32, bfloat16 "
                    "or float16, or a GGUF file"
                )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            name: tuple(handle.get_slice(name).get_shape())
            for name, handle in self._handles.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)

    def layout(self, family: ModelFamily) -> tuple[StoredTensor, ...]:
        return family.hf_layout(self._handles)

    def on(self, mesh: Mesh) -> "HuggingFaceWeights":
        return self


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        found = read_json(index, {"weight_map": dict}, "give the index of the model")
        names = found["weight_map"].values()
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{index}: weight_map must give the file of each tensor")
        paths = [Path(name) for name in sorted(set(names))]
        outside = [p for p in paths if p.is_absolute() or ".." in p.parts]
        if outside:
            raise UserError(
                f"{index} names the file {outside[0]}, which lies outside its folder; "
                "an index may name files of its own folder only"
            )
        files = [folder / path for path in paths]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        problem = f"lacks {', '.join(missing)}" if missing else "has no .safetensors"
        pickled = " (pickled .bin weights are never read)"
        raise UserError(
            f"{folder} {problem}{pickled if list(folder.glob('*.bin')) else ''}"
        )
    return files
