"""A GGUF file of llama.cpp: its metadata, and its weights one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.formats.tensor_file import fingerprint_files
from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.family_registry import find_gguf_family, from_hf_config
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor


class GGUFFile:
    """An open file; tensors are dequantised as they are read.

    Its metadata stands in for a `config.json` and for a tokenizer's files.

    Raises:
      UserError: it is damaged, or no GGUF file.
    """

    def __init__(self, file: Path):
        import gguf

        try:
            reader = gguf.GGUFReader(file)
        except Exception as error:  # The reader raises whatever parsing runs into.
            raise UserError(f"{file} is not a GGUF file: {error}") from error
        self.metadata = {key: f.contents() for key, f in reader.fields.items()}
        self._file = file
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fingerprint = fingerprint_files([file])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        # GGUF lists the fastest dimension first.
        return {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{self._file}: {name} is stored as {tensor.tensor_type.name}, which "
                f"cannot be read ({error}); give the model as Q8_0, F16 or BF16"
            ) from error
        return values.reshape(self.shapes()[name])

    def layout(self, family: ModelFamily) -> tuple[StoredTensor, ...]:
        return family.gguf_tensors

    def on(self, mesh: Mesh) -> "GGUFFile":
        return self

    def read_architecture(self) -> Architecture:
        """The shape that the metadata describe.

        Raises:
          UserError: no family reads such files, a field is missing or malformed, or
            the model computes something that the Block does not.
        """
        where = str(self._file)
        kind = self.metadata.get("general.architecture")
        family = find_gguf_family(kind, where)
        own = f"{kind}."
        fields = ConfigFields(
            {
                key.removeprefix(own): value
                for key, value in self.metadata.items()
                if key.startswith(own)
            },
            where,
        )
        config = {"model_type": family.model_type, **self._hf_config(fields)}
        return from_hf_config(config, where)

    def _hf_config(self, fields: ConfigFields) -> dict[str, Any]:
        """The metadata under the names of a Hugging Face `config.json`."""
        shapes = self.shapes()
        if "token_embd.weight" not in shapes:
            raise UserError(f"{self._file} lacks the tensor token_embd.weight")
        embed = fields.integer("embedding_length")
        heads = fields.integer("attention.head_count")
        epsilon = fields.number("attention.layer_norm_rms_epsilon")
        return {
            "vocab_size": shapes["token_embd.weight"][0],
            "hidden_size": embed,
            "intermediate_size": fields.integer("feed_forward_length"),
            "num_hidden_layers": fields.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
            "head_dim": fields.integer("attention.key_length", embed // heads),
            # The float32 nearest to 1e-5 is meant as 1e-5.
            "rms_norm_eps": float(f"{epsilon:.6g}"),
            "rope_theta": fields.number("rope.freq_base", 10000.0),
            "max_position_embeddings": fields.integer("context_length", 2048),
            "tie_word_embeddings": "output.weight" not in shapes,
            "rope_scaling": self._rope_scaling(fields),
        }

    def _rope_scaling(self, fields: ConfigFields) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self._tensors:
            raise UserError(
                f"{self._file} keeps its rotary scaling as a table (Llama 3.1 and "
                "newer), from which the original settings cannot be read; use the "
                "model's Hugging Face folder, whose config.json has them"
            )
        kind = fields.get("rope.scaling.type", "none")
        if kind in ("none", ""):
            return None
        return {"rope_type": kind, "factor": fields.number("rope.scaling.factor", 1.0)}
