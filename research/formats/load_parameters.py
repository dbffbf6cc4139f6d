"""Open weights into sharded parameters: one name table, three kinds of files.

A Hugging Face folder (safetensors, one file or many) and a GGUF file are read through
the same two methods, `shape` and `read`, under Hugging Face's tensor names. A stacked
parameter is filled layer by layer into the slices that this process's devices hold, so
a host never holds more than its own share of one parameter and one tensor of a file.
Nothing here unpickles, and nothing runs code that came with weights.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.formats.base_model import Base
from research.formats.tensor_file import TensorFile
from research.formats.tensor_names import HF_NAMES, from_hf_layout, to_hf_layout
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.weights.parameter_spec import Spec

Array = jax.Array


def check_shapes(tensors: TensorFile, specs: Mapping[str, Spec]) -> None:
    """Every parameter has its tensors, of its shape, and no tensor is left over.

    Raises:
      UserError: names the first missing, misshapen or extra tensors.
    """
    found = dict(tensors.shapes())
    wrong = []
    for path, spec in specs.items():
        one = np.empty(spec.shape[spec.stacked :], np.bool_)
        expected = to_hf_layout(path, one).shape
        for name in _tensor_names(path, spec):
            shape = found.pop(name, None)
            if shape is None:
                wrong.append(f"{name} is missing")
            elif shape != expected:
                wrong.append(f"{name} is {list(shape)}, not {list(expected)}")
    # Old exports carry the rotary table, which is computed here.
    wrong += [
        f"{name} is not part of this model"
        for name in found
        if not name.endswith("rotary_emb.inv_freq")
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"the weights do not fit their config: {'; '.join(wrong[:5])}{more}"
        )


def _tensor_names(path: str, spec: Spec) -> list[str]:
    copies = spec.shape[0] if spec.stacked else 1
    return [HF_NAMES[path].format(i) for i in range(copies)]


def load_base(
    base: Base, model: Model, mesh: Mesh, dtype: Any, seed: int
) -> dict[str, Array]:
    """The parameters of a base model in their shardings.

    Args:
      base: opened; without tensors the parameters are drawn at random.
      model: of `base.architecture`.
      mesh: the devices to shard over.
      dtype: of the result.
      seed: of the random draw, which is the same on every mesh.
    """
    shardings = meshes.shardings(model.specs, mesh)
    if base.tensors is not None:
        return load_params(base.tensors, model.specs, shardings, dtype)

    def init(key: Array) -> dict[str, Array]:
        return jax.tree.map(lambda x: x.astype(dtype), model.init(key))

    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def load_params(
    tensors: TensorFile,
    specs: Mapping[str, Spec],
    shardings: Mapping[str, Any],
    dtype: Any,
) -> dict[str, Array]:
    """All parameters, each made directly in its sharding.

    Args:
      tensors: an open file.
      specs: of the model.
      shardings: `jax.sharding.Sharding` by path.
      dtype: of the result.
    """
    check_shapes(tensors, specs)
    return {
        path: _load_one(tensors, path, spec, shardings[path], np.dtype(dtype))
        for path, spec in specs.items()
    }


def _load_one(
    tensors: TensorFile, path: str, spec: Spec, sharding: Any, dtype: np.dtype
) -> Array:
    """Fills each distinct slice that this process holds, one file tensor at a time."""
    by_device = sharding.addressable_devices_indices_map(spec.shape)
    slices = {
        tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
        for index in by_device.values()
    }
    buffers = {
        bounds: np.empty([stop - start for start, stop in bounds], dtype)
        for bounds in slices
    }
    for layer, name in enumerate(_tensor_names(path, spec)):
        tensor = from_hf_layout(path, tensors.read(name), spec)
        for bounds, buffer in buffers.items():
            inner = tuple(slice(*b) for b in bounds[spec.stacked :])
            if not spec.stacked:
                buffer[...] = tensor[inner]
            elif bounds[0][0] <= layer < bounds[0][1]:
                buffer[layer - bounds[0][0]] = tensor[inner]
    arrays = []
    for device, index in by_device.items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
        arrays.append(jax.device_put(buffers[bounds], device))
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)
