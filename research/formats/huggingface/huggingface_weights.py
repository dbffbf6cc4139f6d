"""The config and weights of a Hugging Face folder, read one tensor at a time."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.core.json_files import read_json
from research.core.local_paths import holds_adapter
from research.formats.huggingface.packed.bitsandbytes_tensors import find_bitsandbytes
from research.formats.huggingface.packed.mxfp4_tensors import find_mxfp4
from research.formats.huggingface.packed.packed_integers import find_packed_integers
from research.formats.huggingface.packed.packed_tensor import (
    FLOATS,
    PackedTensor,
    StoredParts,
)
from research.formats.huggingface.packed.quantization_config import read_packing
from research.formats.tensor_file import fingerprint_files
from research.models.architecture import Architecture
from research.models.families.family_registry import from_hf_config
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor
from research.weights.quantized.block_kind import BlockKind, CodedMatrix

INDEX = "model.safetensors.index.json"
PIECE = 2**24  # numbers of a tensor that are read at a time
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


def read_hf_config(folder: Path) -> Architecture:
    """The shape that the folder's `config.json` describes.

    Raises:
      UserError: it is absent, damaged, describes a model of no known family, or
        announces codes that are not read.
    """
    file = folder / "config.json"
    if not file.is_file():
        adapter = (
            ", as it is an adapter folder of PEFT and no base model: give it as --run "
            "to research.generate, serve, evaluate or export, or as "
            "--config.lora.init_from to research.train"
        )
        raise UserError(
            f"{folder} has no config.json{adapter if holds_adapter(folder) else ''}"
        )
    config = read_json(file, dict, "give the file of the model")
    read_packing(config, str(file))
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
        return bool(_weight_files(folder)[0])
    except UserError:
        return False


class HuggingFaceWeights:
    """The `*.safetensors` of a Hugging Face folder: one file, or an index of many.

    Raises:
      UserError: there are none; or one is missing or damaged, lacks a tensor that the
        index places in it, or repeats one of another file.
    """

    def __init__(self, folder: Path):
        self._folder, self._files = folder, dict[str, Path]()
        self.place = str(folder)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        files, placed = _weight_files(folder)
        for file in files:
            with _opened(file) as handle:
                names = handle.keys()  # One cannot iterate over a handle.
                for name in names:
                    self._add(name, file, handle.get_slice(name))
        for name, file in placed.items():
            if self._files.get(name) != file:
                raise UserError(
                    f"{folder}: {INDEX} places {name} in {file.name}, which does not "
                    "have it; copy the files of the model again"
                )
        self._packed = self._find_packed()
        for name in self._shapes:
            # Others may be tables that nobody reads.
            if name.endswith(".weight") and name not in self._packed:
                self._require_numbers(name)
        self._hashed = files

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the files; the first use reads them."""
        return fingerprint_files(self._hashed)

    def _add(self, name: str, file: Path, found: Any) -> None:
        if name in self._files:
            raise UserError(
                f"{self._folder}: {name} is in {self._files[name].name} and in "
                f"{file.name}; remove the file that is not part of the model"
            )
        self._files[name] = file
        self._shapes[name] = tuple(found.get_shape())
        self._types[name] = found.get_dtype()

    def _find_packed(self) -> dict[str, PackedTensor]:
        """The tensors in several parts, each of which counts as one."""
        file = self._folder / "config.json"
        config = read_json(file, dict, "give the model's") if file.is_file() else {}
        packing = read_packing(config, str(file))
        stored = StoredParts(self._folder, self._shapes, self._types, self._read)
        found = find_mxfp4(stored) | find_bitsandbytes(stored)
        found |= find_packed_integers(stored, packing)
        parts = {part for tensor in found.values() for part in tensor.parts}
        for name in found.keys() & self._shapes.keys() - parts:
            raise stored.damaged(f"{name} is there as numbers, and once more in codes")
        kept = {n: shape for n, shape in self._shapes.items() if n not in parts}
        self._shapes = kept | {name: x.shape for name, x in found.items()}
        return found

    def _require_numbers(self, name: str) -> None:
        """A checkpoint can hold codes for weights without a word in its config."""
        kind = self._types[name]
        if kind not in PLAIN_TYPES:
            raise UserError(
                f"{self._folder}: {name} is stored as {kind}, so the weights are "
                "quantised; give the model as it was before, in float32, bfloat16 "
                "or float16, or a GGUF file"
            )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        if name in self._packed:
            return self._packed[name].read()
        self._require_numbers(name)
        return self._read(name)

    def _read(self, name: str) -> np.ndarray:
        file, value = self._files[name], None
        with _opened(file) as handle:
            shape = handle.get_slice(name).get_shape()
            size = math.prod(shape)
            if size <= PIECE:
                return handle.get_tensor(name)
        step = max(1, PIECE * shape[0] // size)
        for begin in range(0, shape[0], step):
            part = self._read_rows(name, slice(begin, min(begin + step, shape[0])))
            if value is None:
                value = np.empty(shape, part.dtype)
            value[begin : begin + step] = part
        assert value is not None
        return value

    def read_rows(self, name: str, rows: slice) -> np.ndarray:
        if name in self._packed:
            return self._packed[name].read()[rows]
        return self._read_rows(name, rows)

    def _read_rows(self, name: str, rows: slice) -> np.ndarray:
        # All that was read of an open file stays in the memory of the process.
        with _opened(self._files[name]) as handle:
            return handle.get_slice(name)[rows]

    def block_kind(self, name: str) -> BlockKind | None:
        return self._packed[name].block_kind if name in self._packed else None

    def codes(self, name: str) -> CodedMatrix:
        return self._packed[name].codes()

    def kind(self, name: str) -> str:
        if name in self._packed:
            return self._packed[name].kind
        return FLOATS.get(self._types[name], self._types[name])

    def facts(self) -> Mapping[str, str]:
        with _opened(next(iter(self._files.values()))) as handle:
            return handle.metadata() or {}

    def layout(self, family: ModelFamily) -> tuple[StoredTensor, ...]:
        tensors = family.hf_layout(self._shapes)
        if not any(tensor.codes for tensor in self._packed.values()):
            return tensors
        return tuple(map(self._as_linear, tensors))

    def _as_linear(self, tensor: StoredTensor) -> StoredTensor:
        """`tensor` as it lies in codes: `[out, in]`, also where its numbers do not.

        Raises:
          UserError: its numbers lie otherwise, and only some of its layers are codes.
        """
        if tensor.transposed or not tensor.paths[0].endswith(".kernel"):
            return tensor
        pattern = re.escape(tensor.name).replace(r"\{\}", r"\d+")
        names = [name for name in self._shapes if re.fullmatch(pattern, name)]
        in_codes = [n for n in names if n in self._packed and self._packed[n].codes]
        if not in_codes:
            return tensor
        if len(in_codes) < len(names):
            raise UserError(
                f"{self._folder}: {in_codes[0]} lies in codes, and "
                f"{min({*names} - {*in_codes})} does not; give a model in which all "
                "layers or none have codes"
            )
        return dataclasses.replace(tensor, transposed=True)

    def on(self, mesh: Mesh) -> "HuggingFaceWeights":
        return self


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The open file. Raises UserError: it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a safetensors file: {error}; copy it again"
        ) from error


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files of weights, and the file of each tensor where an index says so."""
    index = folder / INDEX
    files, placed = sorted(folder.glob("*.safetensors")), dict[str, Path]()
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
        placed = {tensor: folder / name for tensor, name in found["weight_map"].items()}
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        problem = f"lacks {', '.join(missing)}" if missing else "has no .safetensors"
        pickled = " (pickled .bin weights are never read)"
        raise UserError(
            f"{folder} {problem}{pickled if list(folder.glob('*.bin')) else ''}; copy "
            "all files of the model, with its weights as .safetensors"
        )
    return files, placed
