"""Writes a trained model as a Hugging Face folder, for other tools and `init_from`.

A host holds one layer of one parameter at a time, beside the file that it is filling.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.core.atomic_files import make_folder, publish_folder, sync, write_whole
from research.core.errors import UserError
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of, to_hf_config
from research.models.families.stored_tensor import used
from research.models.transformer import Model
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.tokenizer_training import save_tokenizer
from research.weights.contraction import materialize

FILE_BYTES = 2 * 2**30
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export(
    model: Model,
    weights: dict[str, Any],
    tokenizer: Tokenizer,
    folder: Path,
    dtype: str = "float32",
    describe: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes config.json, safetensors and tokenizer; every process must call it.

    Args:
      model: has the architecture and the specs.
      weights: by path; adapters are added to their matrices.
      tokenizer: of the model.
      folder: made anew; an old folder is replaced once all files are written.
      dtype: of the file: float32, bfloat16 or float16.
      describe: adds files to the folder, before it gets its name.

    Raises:
      UserError: a number is not finite in the file's dtype.
      OSError: the folder cannot be written.

    After an error no part of the export stays, and an older one is as it was.
    """
    writer = _Writer(folder, np.dtype(jnp.dtype(dtype)))
    for stored in used(family_of(model.architecture).hf_tensors, model.specs):
        for name, index in stored.names(model.specs):
            values = [fetch(weights[path], index) for path in stored.paths]
            if writer.leading:
                writer.add(name, stored.pack(values, model.specs))
    if not writer.leading:
        return
    config = to_hf_config(model.architecture) | {"torch_dtype": dtype}
    writer.finish(config, tokenizer, describe)
    logging.info("export: %s, %s", folder, dtype)


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


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2))


def _marks(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of control tokens, as both config files have them."""
    ends = list(tokenizer.end_ids)
    eos = ends[0] if len(ends) == 1 else ends or None
    marks = zip(MARKS, (tokenizer.bos, eos, tokenizer.pad), strict=True)
    return {name: value for name, value in marks if value is not None}


def fetch(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """One layer of a parameter on every host, with its adapter added."""
    sharding = jax.tree.leaves(leaf)[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return np.asarray(_jit_pick(sharding)(leaf, index))


@functools.cache
def _jit_pick(sharding: Any) -> Any:
    def pick(leaf: Any, index: tuple[Any, ...]) -> jax.Array:
        # In float32, so that an added adapter is rounded once, to the file's dtype.
        return materialize(jax.tree.map(lambda x: _widened(x[index]), leaf))

    return jax.jit(pick, out_shardings=sharding)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _require_finite(name: str, tensor: np.ndarray, stored: np.ndarray) -> None:
    """Raises UserError: `stored`, which is `tensor` in the file's dtype, is not."""
    if np.isfinite(stored).all():
        return
    if np.isfinite(tensor).all():
        wider = "float32" if stored.dtype == jnp.bfloat16 else "bfloat16 or float32"
        raise UserError(
            f"{name} holds {np.abs(tensor).max():g}, which is too large for "
            f"{stored.dtype}; export with --dtype={wider}"
        )
    raise UserError(
        f"{name} holds numbers that are not finite; export an earlier step with --step"
    )


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file for good. Raises OSError: the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if "I/O error" in str(error):
            raise OSError(f"{path}: {error}") from error
        raise
    # safetensors lets only the owner read it; the umask has made the folder's mode.
    path.chmod(path.parent.stat().st_mode & 0o666)
    sync(path)


class _Writer:
    """Fills one safetensors file after the other, then writes the index."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.leading = jax.process_index() == 0
        self._folder, self._dtype = folder, dtype
        self._partial = folder.with_name(f"{folder.name}.partial")
        self._tensors: dict[str, np.ndarray] = {}
        self._files: list[list[str]] = []
        self._bytes = 0
        if self.leading:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._guard(lambda: make_folder(self._partial))

    def _guard(self, write: Any) -> None:
        try:
            write()
        except BaseException:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def add(self, name: str, tensor: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(tensor.astype(self._dtype))
        self._guard(lambda: _require_finite(name, tensor, stored))
        if self._tensors and self._held() + stored.nbytes > FILE_BYTES:
            self._flush()
        self._tensors[name] = stored

    def _held(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _flush(self) -> None:
        path = self._partial / f"{len(self._files)}.safetensors"
        self._guard(lambda: _save(self._tensors, path))
        self._files.append(list(self._tensors))
        self._bytes += self._held()
        self._tensors = {}

    def finish(
        self,
        config: dict[str, Any],
        tokenizer: Tokenizer,
        describe: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self._flush()
        self._guard(lambda: self._finish(config, tokenizer, describe))

    def _finish(
        self,
        config: dict[str, Any],
        tokenizer: Tokenizer,
        describe: Callable[[Path], None],
    ) -> None:
        count, placed = len(self._files), {}
        for i, names in enumerate(self._files):
            name = f"model-{i + 1:05}-of-{count:05}.safetensors"
            if count == 1:
                name = "model.safetensors"
            (self._partial / f"{i}.safetensors").rename(self._partial / name)
            placed |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": placed}
            _write_json(self._partial / "model.safetensors.index.json", index)
        _save_settings(config, tokenizer, self._partial)
        describe(self._partial)
        replaced = self._folder.with_name(f"{self._folder.name}.replaced")
        # The old folder leaves as a whole: no part of it may pass for a model.
        if self._folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            self._folder.rename(replaced)
        publish_folder(self._partial, self._folder)
        shutil.rmtree(replaced, ignore_errors=True)
