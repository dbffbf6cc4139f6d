"""Open weights into sharded parameters, whatever the format of the files.

A stacked parameter is filled tensor by tensor into the slices that this process's
devices hold, so a host never holds more than its own share of one parameter and one
tensor of a file. Nothing here unpickles, and nothing runs code that came with weights.
"""

import collections
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.formats.base_model import Base
from research.formats.kept_tensors import read_kept, say_what_is_kept
from research.formats.tensor_file import TensorFile, read_finite
from research.models.families.family_registry import family_of
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor, used
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.weights.parameter_spec import Spec
from research.weights.quantized.kept_codes import KeptMatrix
from research.weights.representations.leaf import Matrix
from research.weights.trainable import Trainable

Array = jax.Array


def load_frozen(
    base: Base, model: Model, mesh: Mesh, split: Trainable, seed: int
) -> dict[str, Matrix]:
    """The frozen parameters in the format in which `split` stores them.

    See `load_base` for the other arguments.
    """
    meshes.shardings(split.frozen_specs, mesh)  # Refuses what does not divide.
    if base.tensors is not None:
        tensors, family = base.tensors.on(mesh), family_of(model.architecture)
        check_tensors(tensors, model)
        if split.keeps_codes:
            say_what_is_kept(split.frozen_specs, model.specs, split.frozen_dtype)
        return {
            path: load_frozen_param(tensors, family, path, model.specs, split, mesh)
            for path in model.specs
        }
    drawn = load_base(base, model, mesh, split.frozen_dtype, seed)
    return {
        path: _stored(split, path, drawn.pop(path), spec, mesh)
        for path, spec in model.specs.items()
    }


def _stored(
    split: Trainable, path: str, weight: Array, spec: Spec, mesh: Mesh
) -> Matrix:
    """`weight`, which lies over the mesh, in the format in which `split` stores it."""
    stored = split.frozen_specs[path]
    if stored == spec:
        return weight
    sharding = meshes.shardings({path: stored}, mesh)[path]
    store = functools.partial(split.store, path, spec=spec)
    return jax.jit(store, out_shardings=sharding)(weight)


def load_base(
    base: Base,
    model: Model,
    mesh: Mesh,
    dtype: Any,
    seed: int,
) -> dict[str, Array]:
    """The parameters of a base model in their shardings.

    Args:
      base: opened; without tensors the parameters are drawn at random.
      model: of `base.architecture`.
      mesh: the devices to shard over.
      dtype: of the loaded arrays.
      seed: of the random draw, which is the same on every mesh.
    """
    shardings = meshes.shardings(model.specs, mesh)
    if base.tensors is not None:
        return load_params(base.tensors.on(mesh), model, shardings, dtype)

    def init(key: Array) -> dict[str, Array]:
        return jax.tree.map(lambda x: x.astype(dtype), model.init(key))

    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def load_params(
    tensors: TensorFile,
    model: Model,
    shardings: Mapping[str, Any],
    dtype: Any,
) -> dict[str, Array]:
    """All parameters, each made directly in its sharding.

    Args:
      tensors: an open file.
      model: of the architecture that lies in the file.
      shardings: `jax.sharding.Sharding` by path.
      dtype: of the loaded arrays.

    Raises:
      UserError: the file does not hold this model.
    """
    check_tensors(tensors, model)
    family = family_of(model.architecture)
    return {
        path: load_param(tensors, family, path, model.specs, shardings[path], dtype)
        for path in model.specs
    }


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
        if not family.ignores(name) and not _adds_nothing(tensors, name)
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{tensors.place}: the weights do not fit their config: "
            f"{'; '.join(wrong[:5])}{more}; give the config.json, or the GGUF file, "
            "that belongs to these weights"
        )


def _adds_nothing(tensors: TensorFile, name: str) -> bool:
    """Whether it is a bias of zeros, as AutoGPTQ gives to every matrix in codes."""
    weight = name.removesuffix("bias") + "weight"
    return (
        name.endswith(".bias")
        and weight in tensors.shapes()
        and tensors.kind(weight) == "gptq"
        and not tensors.read(name).any()
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
            f"{tensors.place}: the config ties the head to the embeddings, but {head} "
            f"differs from {table}; if the head is the model's own, set "
            f"tie_word_embeddings to false in config.json, or else remove {head}"
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
    parts = _parts(tensors, family, path, specs)
    return make_sharded(specs[path].shape, dtype, sharding, parts)


def load_frozen_param(
    tensors: TensorFile,
    family: ModelFamily,
    path: str,
    specs: Mapping[str, Spec],
    split: Trainable,
    mesh: Mesh,
) -> Matrix:
    """One parameter of a model of `family` in the format in which `split` stores it.

    Each tensor of the file becomes codes by itself, on one device, which gives the same
    codes on every mesh. So beside codes only one tensor is in memory, whole as it is.
    """
    spec, stored = specs[path], split.frozen_specs[path]
    sharding = meshes.shardings({path: stored}, mesh)[path]
    parts = _parts(tensors, family, path, specs)
    dtype = split.frozen_dtype
    if stored == spec:
        return make_sharded(spec.shape, dtype, sharding, parts)

    @functools.cache
    def store(done: int) -> Callable[[Array], Matrix]:
        one = spec.of_stack(done)
        return jax.jit(lambda weight: split.store(path, weight, one))

    def quantized() -> Iterator[tuple[tuple[int, ...], list[Any]]]:
        device = jax.local_devices()[0]
        for index, value in parts:  # All processes read all tensors, in one order.
            if held(index):
                weight = jax.device_put(np.asarray(value, dtype), device)
                yield index, jax.tree.leaves(store(len(index))(weight))

    def held(index: tuple[int, ...]) -> bool:
        return any(array.holds(index) for array in arrays)

    described = jax.tree.leaves(stored)
    arrays = [
        ShardedFill(x.shape, x.dtype or dtype, where)
        for x, where in zip(described, jax.tree.leaves(sharding), strict=True)
    ]
    made = quantized()
    if isinstance(stored, KeptMatrix):
        (own,) = [x for x in tensors.layout(family) if path in x.paths]
        made = read_kept(tensors, own, path, specs, stored, held)
    for index, leaves in made:
        for array, part in zip(arrays, leaves, strict=True):
            array.fill(index, np.asarray(part))
    structure = jax.tree.structure(stored)
    return jax.tree.unflatten(structure, [array.finish() for array in arrays])


def _parts(
    tensors: TensorFile, family: ModelFamily, path: str, specs: Mapping[str, Spec]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The values of a parameter by their index into its first axes."""
    (stored,) = [x for x in tensors.layout(family) if path in x.paths]
    for name, index in stored.names(specs):
        yield index, stored.unpack(path, read_finite(tensors, name), specs)


class ShardedFill:
    """The shards of an array that this process holds, while they are filled."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Any):
        self._shape, self._sharding = shape, sharding
        where = sharding.addressable_devices_indices_map(shape)
        self._by_device = {
            device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
            for device, index in where.items()
        }
        self._buffers = {
            bounds: np.empty([stop - start for start, stop in bounds], np.dtype(dtype))
            for bounds in self._by_device.values()
        }

    def holds(self, index: tuple[int, ...]) -> bool:
        """Whether any part of `array[index]` is among the shards."""
        return any(_is_within(index, bounds) for bounds in self._buffers)

    def fill(self, index: tuple[int, ...], value: np.ndarray) -> None:
        """Sets `array[index]`, where `index` is one of the first axes."""
        for bounds, buffer in self._buffers.items():
            if _is_within(index, bounds):
                outer, inner = bounds[: len(index)], bounds[len(index) :]
                place = tuple(i - b[0] for i, b in zip(index, outer, strict=True))
                part = value[tuple(slice(*b) for b in inner)]
                # Cast first: that is fast in the order of the memory, and an assignment
                # to a transposed matrix is slow.
                buffer[place] = part.astype(buffer.dtype, copy=False)

    def finish(self) -> Array:
        """The array. A buffer goes as soon as its devices have it."""
        arrays = []
        waiting = collections.Counter(self._by_device.values())
        for device, bounds in self._by_device.items():
            placed = jax.device_put(self._buffers[bounds], device)
            arrays.append(placed.block_until_ready())
            waiting[bounds] -= 1
            if not waiting[bounds]:
                del self._buffers[bounds]  # Room for the next part.
        return jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, arrays
        )


def _is_within(index: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> bool:
    held = zip(bounds, index, strict=False)
    return all(start <= i < stop for (start, stop), i in held)


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
    array = ShardedFill(shape, dtype, sharding)
    for index, value in parts:
        array.fill(index, value)
    return array.finish()
