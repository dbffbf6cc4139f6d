"""A GGUF file of llama.cpp, read one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.formats.tensor_file import fingerprint_files
from research.formats.tensor_names import GGUF_NAMES


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
        self.fingerprint = fingerprint_files([file])

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
