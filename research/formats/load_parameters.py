"""Open weights into sharded parameters, whatever the format of the files.

A stacked parameter is filled tensor by tensor into the slices that this process's
devices hold, so a host never holds more than its own share of one parameter and one
tensor of a file. Nothing here unpickles, and nothing runs code that came with weights.
"""

import collections
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.formats.base_model import Base
from research.formats.tensor_file import TensorFile
from research.models.families.family_registry import family_of
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor, used
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Matrix
from research.weights.trainable import Trainable

Array = jax.Array


def load_frozen(
    base: Base, model: Model, mesh: Mesh, split: Trainable, seed: int
) -> dict[str, Matrix]:
    """The frozen parameters in the format in which `split` stores them.

    A parameter is stored as soon as it is loaded, so only one at a time takes the
    memory of a plain array. See `load_base` for the other arguments.
    """
    meshes.shardings(split.frozen_specs, mesh)  # Refuses what does not divide.

    def store(path: str, weight: Array) -> Matrix:
        return store_frozen(split, path, weight, model.specs[path], mesh)

    return load_base(base, model, mesh, split.frozen_dtype, seed, store)


def store_frozen(
    split: Trainable, path: str, weight: Array, spec: Spec, mesh: Mesh
) -> Matrix:
    """`weight`, which `spec` describes, in the format in which `split` stores it."""
    stored = split.frozen_specs[path]
    if stored == spec:
        return weight
    sharding = meshes.shardings({path: stored}, mesh)[path]
    store = jax.jit(functools.partial(split.store, path), out_shardings=sharding)
    return store(weight)


def load_base(
    base: Base,
    model: Model,
    mesh: Mesh,
    dtype: Any,
    seed: int,
    store: Callable[[str, Array], Any] = lambda path, weight: weight,
) -> dict[str, Any]:
    """The parameters of a base model in their shardings.

    Args:
      base: opened; without tensors the parameters are drawn at random.
      model: of `base.architecture`.
      mesh: the devices to shard over.
      dtype: of the loaded arrays.
      seed: of the random draw, which is the same on every mesh.
      store: `(path, weight) -> value`, what is kept of each parameter.
    """
    shardings = meshes.shardings(model.specs, mesh)
    if base.tensors is not None:
        return load_params(base.tensors.on(mesh), model, shardings, dtype, store)

    def init(key: Array) -> dict[str, Array]:
        return jax.tree.map(lambda x: x.astype(dtype), model.init(key))

    drawn = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    return {path: store(path, weight) for path, weight in drawn.items()}


def load_params(
    tensors: TensorFile,
    model: Model,
    shardings: Mapping[str, Any],
    dtype: Any,
    store: Callable[[str, Array], Any] = lambda path, weight: weight,
) -> dict[str, Any]:
    """All parameters, each made directly in its sharding.

    Args:
      tensors: an open file.
      model: of the architecture that lies in the file.
      shardings: `jax.sharding.Sharding` by path.
      dtype: of the loaded arrays.
      store: `(path, weight) -> value`, what is kept of each parameter.

    Raises:
      UserError: the file does not hold this model.
    """
    check_tensors(tensors, model)
    family = family_of(model.architecture)

    def load(path: str) -> Array:
        return load_param(tensors, family, path, model.specs, shardings[path], dtype)

    return {path: store(path, load(path)) for path in model.specs}


def check_tensors(tensors: TensorFile, model: Model) -> None:
    """Checks that every parameter has its tensors, and that no tensor remains.

    Raises:
      UserError: names the first missing, misshapen or extra tensors.
    """
    family = family_of(model.architecture)
    layout = tensors.layout(family)
    found, wrong = dict(tensors.shapes()), []
    for stored in used(layout, model.specs):
        expected = stored.shape(model.specs)
        for name, _ in stored.names(model.specs):
            shape = found.pop(name, None)
            if shape is None:
                wrong.append(f"{name} is missing")
            elif shape != expected:
                wrong.append(f"{name} is {list(shape)}, not {list(expected)}")
    if model.architecture.tied_head:
        found.pop(_copied_head(tensors, layout), None)
    wrong += [
        f"{name} is not part of this model"
        for name in found
        if not family.ignores(name)
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"the weights do not fit their config: {'; '.join(wrong[:5])}{more}; give "
            "the config.json, or the GGUF file, that belongs to these weights"
        )


def _copied_head(tensors: TensorFile, layout: tuple[StoredTensor, ...]) -> str | None:
    """The name of a head that a file has although the embeddings are tied.

    Many tools write both. A head of its own must not be dropped silently.

    Raises:
      UserError: it differs from the embeddings.
    """
    names = {path: stored.name for stored in layout for path in stored.paths}
    head, table = names["head.kernel"], names["embedding.table"]
    if not {head, table} <= tensors.shapes().keys():
        return None
    if not np.array_equal(tensors.read(head), tensors.read(table)):
        raise UserError(
            f"the config ties the head to the embeddings, but {head} differs from "
            f"{table}; if the head is the model's own, set tie_word_embeddings to "
            f"false in config.json, or else remove {head}"
        )
    logging.info("weights: %s repeats %s, and is not read", head, table)
    return head


def load_param(
    tensors: TensorFile,
    family: ModelFamily,
    path: str,
    specs: Mapping[str, Spec],
    sharding: Any,
    dtype: Any,
) -> Array:
    """One parameter of a model of `family`, whose tensors were checked before.

    Fills each distinct slice that this process holds, one file tensor at a time.
    """
    (stored,) = [x for x in tensors.layout(family) if path in x.paths]
    parts = (
        (index, stored.unpack(path, tensors.read(name), specs))
        for name, index in stored.names(specs)
    )
    return make_sharded(specs[path].shape, dtype, sharding, parts)


def make_sharded(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Any,
    parts: Iterable[tuple[tuple[int, ...], np.ndarray]],
) -> Array:
    """An array in its sharding, filled part by part.

    Args:
      shape, dtype: of the array.
      sharding: in which it is made.
      parts: all indices into the first axes, with the values there.
    """
    by_device = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers = {
        bounds: np.empty([stop - start for start, stop in bounds], np.dtype(dtype))
        for bounds in by_device.values()
    }
    for index, value in parts:
        for bounds, buffer in buffers.items():
            outer, inner = bounds[: len(index)], bounds[len(index) :]
            held = zip(outer, index, strict=True)
            if all(start <= i < stop for (start, stop), i in held):
                place = tuple(i - b[0] for i, b in zip(index, outer, strict=True))
                buffer[place] = value[tuple(slice(*b) for b in inner)]
    arrays = []
    waiting = collections.Counter(by_device.values())
    for device, bounds in by_device.items():
        arrays.append(jax.device_put(buffers[bounds], device).block_until_ready())
        waiting[bounds] -= 1
        if not waiting[bounds]:
            del buffers[bounds]  # Room for the next part.
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
