"""Open weights into sharded parameters: one name table, three kinds of files.

A Hugging Face folder (safetensors, one file or many) and a GGUF file are read through
the same two methods, `shape` and `read`, under Hugging Face's tensor names. A stacked
parameter is filled layer by layer into the slices that this process's devices hold, so
a host never holds more than its own share of one parameter and one tensor of a file.
Nothing here unpickles, and nothing runs code that came with weights.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from research.errors import UserError
from research.matrix import Spec

Array = jax.Array

# Our path -> Hugging Face's name; {} is the layer. Every file kind speaks these.
HF_NAMES = {
    "embedding.table": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
    "layers.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attention.query.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attention.key.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attention.value.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attention.output.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down.kernel": "model.layers.{}.mlp.down_proj.weight",
}

# llama.cpp's name -> Hugging Face's, without prefix and layer.
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def to_hf_layout(path: str, kernel: np.ndarray) -> np.ndarray:
    """One layer's parameter as Hugging Face stores it: matrices are [out, in]."""
    if path == "embedding.table" or kernel.ndim == 1:
        return kernel
    n_in = 2 if path == "layers.attention.output.kernel" else 1
    inputs = int(np.prod(kernel.shape[:n_in]))
    return kernel.reshape(inputs, -1).T


def from_hf_layout(path: str, tensor: np.ndarray, spec: Spec) -> np.ndarray:
    """Undoes `to_hf_layout`: `tensor` as one layer of `spec`."""
    if path == "embedding.table" or tensor.ndim == 1:
        return tensor
    return tensor.T.reshape(spec.shape[spec.stacked :])


class TensorFile(Protocol):
    """Tensors by Hugging Face name; `fingerprint` is the sha256 of the files."""

    fingerprint: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


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
        self.fingerprint = _fingerprint(files)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            name: tuple(handle.get_slice(name).get_shape())
            for name, handle in self._handles.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)


class GGUFFile:
    """A llama.cpp file; tensors are dequantised as they are read.

    llama.cpp permutes the rows of q and k so that rotary pairs lie side by side; they
    are put back. Its metadata stands in for `config.json` and for the tokenizer.
    """

    def __init__(self, file: Path):
        import gguf

        try:
            reader = gguf.GGUFReader(file)
        except Exception as error:  # The reader raises whatever parsing runs into.
            raise UserError(f"{file} is not a GGUF file: {error}") from error
        self.metadata = {key: f.contents() for key, f in reader.fields.items()}
        self._tensors = {
            self._hf_name(tensor.name): tensor for tensor in reader.tensors
        }
        self._has_rope_table = "rope_freqs.weight" in self._tensors
        self.fingerprint = _fingerprint([file])

    def _hf_name(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "blk" and parts[2] in GGUF_NAMES:
            return f"model.layers.{parts[1]}.{GGUF_NAMES[parts[2]]}.{parts[3]}"
        return f"{GGUF_NAMES.get(parts[0], parts[0])}.{'.'.join(parts[1:])}"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        # GGUF counts dimensions from the fastest.
        return {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape(self.shapes()[name])
        if name.endswith("q_proj.weight"):
            return self._unpermute(values, "llama.attention.head_count")
        if name.endswith("k_proj.weight"):
            return self._unpermute(values, "llama.attention.head_count_kv")
        return values

    def _unpermute(self, values: np.ndarray, heads_key: str) -> np.ndarray:
        heads = self.metadata[heads_key]
        rows = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
        return rows.swapaxes(1, 2).reshape(values.shape)

    def hf_config(self) -> dict[str, Any]:
        """The metadata under the names of a Hugging Face `config.json`."""
        m = self.metadata
        if m.get("general.architecture") != "llama":
            raise UserError(
                f"the GGUF file holds a {m.get('general.architecture')!r} model; llama "
                "is supported"
            )
        embed, heads = m["llama.embedding_length"], m["llama.attention.head_count"]
        return {
            "model_type": "llama",
            "vocab_size": self.shapes()["model.embed_tokens.weight"][0],
            "hidden_size": embed,
            "intermediate_size": m["llama.feed_forward_length"],
            "num_hidden_layers": m["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": m.get("llama.attention.head_count_kv", heads),
            "head_dim": m.get("llama.attention.key_length", embed // heads),
            # The float32 nearest to 1e-5 is meant as 1e-5.
            "rms_norm_eps": float(f"{m['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            "rope_theta": m.get("llama.rope.freq_base", 10000.0),
            "max_position_embeddings": m.get("llama.context_length", 2048),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **self._rope_scaling(),
        }

    def _rope_scaling(self) -> dict[str, Any]:
        kind = self.metadata.get("llama.rope.scaling.type", "none")
        if self._has_rope_table:
            raise UserError(
                "the GGUF file keeps its rotary scaling as a table (Llama 3.1 and "
                "newer); use the model's Hugging Face folder, whose config says it"
            )
        if kind in ("none", ""):
            return {}
        factor = self.metadata.get("llama.rope.scaling.factor", 1.0)
        return {"rope_scaling": {"rope_type": kind, "factor": factor}}


def _fingerprint(files: list[Path]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


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
