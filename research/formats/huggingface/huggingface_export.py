"""Writes a trained model as a Hugging Face folder, for other tools and `init_from`.

A host holds one layer of one parameter at a time.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.core.atomic_files import make_folder, write_whole
from research.formats.export_folder import ExportFolder
from research.formats.export_format import (
    ExportedModel,
    ExportOptions,
    WrittenModel,
)
from research.formats.huggingface.huggingface_weights import (
    HuggingFaceWeights,
    read_hf_config,
)
from research.formats.huggingface.safetensors_writer import SafetensorsWriter
from research.formats.written_tensors import whole_model
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of, to_hf_config
from research.models.families.stored_tensor import StoredTensor, used
from research.models.transformer import Model
from research.tokenize.tokenizer import Tokenizer, from_folder
from research.tokenize.tokenizer_training import save_tokenizer
from research.weights.contraction import materialize
from research.weights.representations.leaf import Leaf

FILE_BYTES = 2 * 2**30
CONFIGS = ("config.json", "generation_config.json")
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
```"""


class HuggingFaceFormat:
    """`config.json`, safetensors with the adapters added in, and the tokenizer."""

    name = "hf"
    library, merges = "transformers", True

    def check(self, exported: ExportedModel, options: ExportOptions) -> None:
        to_hf_config(exported.model.architecture)

    def write(
        self, exported: ExportedModel, folder: Path, options: ExportOptions
    ) -> None:
        """See `ExportFormat`; a number that is not finite is a UserError."""
        architecture = exported.model.architecture
        _write_weights(exported, folder, options.dtype)
        if jax.process_index() == 0:
            config = to_hf_config(architecture) | {"torch_dtype": options.dtype}
            _save_settings(config, exported.tokenizer, folder)

    def read_back(self, folder: Path, exported: ExportedModel) -> WrittenModel:
        architecture = read_hf_config(folder)
        tokenizer = from_folder(folder).within(architecture.vocab)
        whole = whole_model(HuggingFaceWeights(folder), architecture, tokenizer)
        return dataclasses.replace(whole, ends={x: _ends(folder / x) for x in CONFIGS})

    def usage(self, exported: ExportedModel, options: ExportOptions) -> str:
        return USAGE


FORMAT = HuggingFaceFormat()


def export(
    model: Model,
    weights: Mapping[str, Any],
    tokenizer: Tokenizer,
    folder: Path,
    dtype: str = "float32",
) -> None:
    """Writes a model that belongs to no run; every process must call it.

    Args:
      model: has the architecture and the specs.
      weights: by path; adapters are added to their matrices.
      tokenizer: of the model.
      folder: made anew; an old folder is replaced once all files are written.
      dtype: of the file: float32, bfloat16 or float16.

    Raises:
      UserError: a number is not finite in the file's dtype.
      OSError: the folder cannot be written.

    After an error no part of the export stays, and an older one is as it was.
    """
    with ExportFolder.claimed(folder) as out, out.filled() as partial:
        exported = ExportedModel(model, weights, tokenizer)
        FORMAT.write(exported, partial, ExportOptions(dtype))
    logging.info("export: %s, %s", folder, dtype)


def _write_weights(exported: ExportedModel, folder: Path, dtype: str) -> None:
    """Fills one safetensors file after the other, and writes their index."""
    specs, leading = exported.model.specs, jax.process_index() == 0
    tensors: dict[str, tuple[StoredTensor, tuple[int, ...]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for stored in used(family_of(exported.model.architecture).hf_tensors, specs):
        shape = stored.shape(specs)
        for name, index in stored.names(specs):
            tensors[name], shapes[name] = (stored, index), shape
    width = np.dtype(jnp.dtype(dtype)).itemsize
    files = _divide({name: width * math.prod(x) for name, x in shapes.items()})
    for place, names in files.items():
        of_file = {name: shapes[name] for name in names}
        with contextlib.ExitStack() as opened:
            writer = None
            if leading:
                file = SafetensorsWriter(folder / place, of_file, dtype, exported.facts)
                writer = opened.enter_context(file)
            for name in names:
                stored, index = tensors[name]
                values = [fetch(exported.weights[path], index) for path in stored.paths]
                if writer:
                    writer.add(name, stored.pack(values, specs))
    if leading and len(files) > 1:
        placed = {name: file for file, names in files.items() for name in names}
        total = sum(width * math.prod(x) for x in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        _write_json(folder / "model.safetensors.index.json", index)


def _divide(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of tensors by the file that they go to, given the bytes of each."""
    parts: list[list[str]] = [[]]
    room = FILE_BYTES
    for name, size in sizes.items():
        if parts[-1] and size > room:
            parts.append([])
            room = FILE_BYTES
        parts[-1].append(name)
        room -= size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {
        f"model-{i + 1:05}-of-{len(parts):05}.safetensors": names
        for i, names in enumerate(parts)
    }


def save_settings(
    architecture: Architecture, tokenizer: Tokenizer, folder: Path
) -> None:
    """Writes all of a Hugging Face folder but the weights. Raises OSError."""
    make_folder(folder)
    _save_settings(to_hf_config(architecture), tokenizer, folder)


def _save_settings(config: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    marks = _marks(tokenizer)
    # Null where the tokenizer has none: a class of transformers has ids of its own.
    _write_json(folder / "config.json", config | dict.fromkeys(MARKS) | marks)
    generation = {**tokenizer.generation, **marks}
    _write_json(folder / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder)


def _ends(file: Path) -> tuple[int, ...]:
    """The ids at which transformers stops, as one of `CONFIGS` has them."""
    found = json.loads(file.read_text()).get("eos_token_id")
    return tuple(found) if isinstance(found, list) else (found,) * (found is not None)


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2))


def _marks(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of control tokens, as both config files have them."""
    ends = list(tokenizer.end_ids)
    eos = ends[0] if len(ends) == 1 else ends or None
    marks = zip(MARKS, (tokenizer.bos, eos, tokenizer.pad), strict=True)
    return {name: value for name, value in marks if value is not None}


def fetch(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """One layer of a parameter on every host; every process must call it.

    A plain array keeps its dtype. Anything else, such as one with an adapter, is summed
    in float32 and stays so, to be rounded once, to the dtype of a file.
    """
    if not index and isinstance(leaf, jax.Array) and _is_on_cpu(leaf):
        return _assembled(leaf)
    return np.asarray(_jit_pick(_sharding_of(leaf, len(index)))(leaf, index))


def _is_on_cpu(array: jax.Array) -> bool:
    """Whether this process can read all of it without a copy."""
    devices = array.sharding.device_set
    return array.is_fully_addressable and {x.platform for x in devices} == {"cpu"}


def _assembled(array: jax.Array) -> np.ndarray:
    """The parts of an array as one, without a second copy on its devices."""
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(shard.data)
    return whole


def _sharding_of(leaf: Any, named: int) -> Any:
    """Where a layer lies: split as its parameter, or whole where hosts share it."""
    arrays = jax.tree.leaves(leaf)
    where = arrays[0].sharding
    if not isinstance(where, NamedSharding):
        return None
    if not where.is_fully_addressable:
        return NamedSharding(where.mesh, PartitionSpec())
    (split, *_) = [x for x in arrays if x.shape == tuple(leaf.shape)] or [None]
    axes = split.sharding.spec[named:] if split is not None else ()
    return NamedSharding(where.mesh, PartitionSpec(*axes))


@functools.cache
def _jit_pick(sharding: Any) -> Any:
    def pick(leaf: Any, index: tuple[Any, ...]) -> jax.Array:
        leaf = jax.tree.map(lambda x: x[index], leaf)
        if not isinstance(leaf, Leaf):
            return leaf
        return materialize(jax.tree.map(_widened, leaf))

    return jax.jit(pick, out_shardings=sharding)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
