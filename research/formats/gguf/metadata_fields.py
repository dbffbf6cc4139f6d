"""llama.cpp's metadata of a model, read and written by one table of each family."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.formats.architecture_parity import differences, excused
from research.formats.gguf.rope_metadata import (
    SCALING,
    read_rope,
    rope_tables,
    shortest,
    write_rope,
)
from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.family_registry import (
    family_of,
    find_gguf_family,
    from_hf_config,
    to_hf_config,
)
from research.models.families.layer_fields import kinds_of_layers
from research.models.families.model_family import ModelFamily

Shapes = Mapping[str, tuple[int, ...]]
EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
PATTERN = "attention.sliding_window_pattern"
LOCAL_BASE = "rope.freq_base_swa"
# Fields in tables of families; all others are whole numbers.
NUMBERS = {
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon",
    "attention.scale", "embedding_scale", "residual_scale", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping", LOCAL_BASE,
}  # fmt: skip
FLAGS = {"use_parallel_residual"}
SOFTMAX = 1  # The only way of llama.cpp to choose experts that is computed here.
NEEDED = {
    "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "expert_count", "expert_used_count",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon",
}  # fmt: skip
ROPE = {
    "rope.freq_base", "rope.dimension_count",
    *(f"{SCALING}{x}" for x in ("type", "factor", "original_context_length",
      "attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
}  # fmt: skip
# Architectures whose heads together are as wide as the embedding, whose vocabulary head
# is a tensor of its own, and whose vocabulary head is always the embeddings.
EVEN_HEADS = {"phi3", "olmo2"}
OWN_HEADS = {"olmo2", "olmoe", "gptneox", "gpt-oss"}
# Its loader takes the embeddings for the head, and stops at a file that has another one
# (llama.cpp, src/models/gemma2.cpp, `load_arch_tensors`).
TIED_HEADS = {"gemma2"}
# They change nothing that is computed.
NOTES = {"vocab_size", "tensor_data_layout", f"{SCALING}finetuned"}


def read_architecture(
    metadata: Mapping[str, Any],
    shapes: Shapes,
    tables: Mapping[str, np.ndarray],
    where: str,
) -> Architecture:
    """The shape that the metadata of a file describe.

    Args:
      metadata: all of them.
      shapes: of the file's tensors, by name.
      tables: those of `rope_metadata.TABLES` that the file has.
      where: the file, for messages.

    Raises:
      UserError: no family reads such files, a field is missing, malformed or of
        unknown meaning, or the model computes something that the Block does not.
    """
    family = find_gguf_family(metadata, where)
    own = f"{family.gguf_architecture}."
    fields = ConfigFields(
        {
            key.removeprefix(own): shortest(value) if type(value) is float else value
            for key, value in metadata.items()
            if key.startswith(own)
        },
        where,
    )
    if EMBEDDINGS not in shapes:
        raise UserError(f"{where} lacks the tensor {EMBEDDINGS}")
    config = _read_table(fields, family)
    head_dim = _read_widths(fields)
    config = _defaults(fields, head_dim) | config
    config |= read_rope(fields, head_dim, tables)
    if config.get("sliding_window") and fields.get(PATTERN) is not None:
        config["layer_types"] = _read_pattern(fields)
    config |= {
        "model_type": family.model_type,
        "vocab_size": shapes[EMBEDDINGS][0],
        "tie_word_embeddings": HEAD not in shapes,
        "attention_bias": bool(
            {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & shapes.keys()
        ),
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    _refuse_unknown(fields, family)
    config |= family.gguf_unsaid(config)
    return from_hf_config(config, f"{where}, in the terms of a config.json")


def _read_table(fields: ConfigFields, family: ModelFamily) -> dict[str, Any]:
    """Fields of `config.json`; in llama.cpp's files, 0 says that there is none."""
    config: dict[str, Any] = {}
    for key, name in family.gguf_fields.items():
        value = fields.get(key)
        if key in FLAGS:
            config[name] = fields.flag(key, False)
        elif value is None and key not in NEEDED:
            continue
        elif value == 0 and value is not False and key not in NEEDED:
            config[name] = None
        elif key in NUMBERS:
            config[name] = fields.number(key)
        else:
            config[name] = fields.integer(key)
    return config


def _read_widths(fields: ConfigFields) -> int:
    """The width of a head, which all fields that name it must agree on."""
    heads = fields.integer("attention.head_count")
    share = fields.integer("embedding_length") // heads
    width = fields.integer("attention.key_length", max(share, 1))
    fields.only("attention.value_length", width)
    fields.only("attention.causal", True)
    return width


def _defaults(fields: ConfigFields, head_dim: int) -> dict[str, Any]:
    """Values that llama.cpp takes for absent fields; families have others."""
    return {
        "head_dim": head_dim,
        "num_key_value_heads": fields.integer("attention.head_count"),
        "max_position_embeddings": 2048,
    }


def _read_pattern(fields: ConfigFields) -> list[str]:
    """Which layers have the window: for each layer, or the period of those without."""
    layers, found = fields.integer("block_count"), fields.get(PATTERN)
    if isinstance(found, list) and all(isinstance(x, bool) for x in found):
        slides = found
    else:
        period = fields.integer(PATTERN)
        slides = [(layer + 1) % period != 0 for layer in range(layers)]
    if len(slides) != layers:
        raise fields.wrong(PATTERN, found, f"one for each of the {layers} layers")
    return kinds_of_layers(slides)


def _refuse_unknown(fields: ConfigFields, family: ModelFamily) -> None:
    """A field of unknown meaning may change what the model computes."""
    window = "attention.sliding_window" in family.gguf_fields
    known = {*family.gguf_fields, *ROPE, *NOTES, "attention.causal"}
    known |= {"attention.key_length", "attention.value_length"}
    known |= {PATTERN} if window else set()
    if "expert_count" in known:
        fields.only("expert_gating_func", SOFTMAX)
        known.add("expert_gating_func")
    if "attention.head_count_kv" not in known:
        fields.only("attention.head_count_kv", fields.integer("attention.head_count"))
        known.add("attention.head_count_kv")
    for key, value in fields.present().items():
        if key not in known and value not in (0, "", [], "none"):
            raise UserError(
                f"{fields.where}: {family.gguf_architecture}.{key} is {value!r:.60}, "
                f"which {family.members} have not: the file asks for a computation "
                "that is not known here. Use the model's Hugging Face folder"
            )


def write_metadata(a: Architecture) -> dict[str, Any]:
    """The metadata that `read_architecture` reads, with `general.architecture`.

    Whole numbers, numbers with a point, flags and texts are of Python's types. The
    tables of `rope_metadata.rope_tables` belong beside them.

    Raises:
      UserError: llama.cpp's files of the family cannot say what this model computes.
    """
    family = family_of(a)
    _refuse_unloadable(a, family)
    a = _without_unknown_windows(a, family)
    config = to_hf_config(a)
    values = write_rope(a)
    for key, name in family.gguf_fields.items():
        if config.get(name) is not None:
            kind = float if key in NUMBERS else bool if key in FLAGS else int
            values[key] = kind(config[name])
    values["attention.head_count_kv"] = a.kv_heads
    values["attention.key_length"] = values["attention.value_length"] = a.head_dim
    values["vocab_size"] = a.vocab
    if a.window_rope and LOCAL_BASE in family.gguf_fields:
        values[LOCAL_BASE] = a.window_rope.theta
    own = family.gguf_architecture
    metadata = {f"{own}.{key}": value for key, value in values.items()}
    metadata["general.architecture"] = own
    _check_written(a, metadata)
    return metadata


def _refuse_unloadable(a: Architecture, family: ModelFamily) -> None:
    """llama.cpp's loader of some families expects tensors of certain shapes."""
    problem = ""
    if family.gguf_architecture in EVEN_HEADS and a.heads * a.head_dim != a.embed:
        problem = f"{a.heads} heads that are not {a.embed} / {a.heads} wide"
    if family.gguf_architecture in OWN_HEADS and a.tied_head:
        problem = "a head that is tied to the embeddings"
    if family.gguf_architecture in TIED_HEADS and not a.tied_head:
        problem = "a head that is not tied to the embeddings"
    if family.gguf_architecture == "gptneox" and "qkv" not in a.biases:
        problem = "attention that has no biases"
    if family.gguf_architecture == "olmoe" and a.kv_heads != a.heads:
        problem = f"{a.kv_heads} heads of keys for {a.heads} of queries"
    if problem:
        raise UserError(
            f"llama.cpp does not load {family.members} with {problem}. Export the "
            "model as a Hugging Face folder"
        )


def _without_unknown_windows(a: Architecture, family: ModelFamily) -> Architecture:
    """A model whose rows end where its window does, if llama.cpp computes none."""
    if family.gguf_period or not a.window:
        return a
    longest = min(a.window, a.max_position)
    logging.warning(
        "llama.cpp computes no windows for %s: the file allows contexts of %d tokens, "
        "in which the window changes nothing",
        family.members,
        longest,
    )
    return dataclasses.replace(
        a, window=0, window_layers=(), window_rope=None, max_position=longest
    )


def _check_written(a: Architecture, metadata: Mapping[str, Any]) -> None:
    shapes = {EMBEDDINGS: (a.vocab, a.embed)}
    shapes |= {} if a.tied_head else {HEAD: (a.vocab, a.embed)}
    shapes |= {"blk.0.attn_q.bias": (1,)} if "qkv" in a.biases else {}
    shapes |= {"blk.0.ffn_up.bias": (1,)} if "mlp" in a.biases else {}
    found = read_architecture(metadata, shapes, rope_tables(a), "the file")
    allowed = excused(a, found)
    for name, (ours, theirs) in differences(a, found).items():
        if name not in allowed:
            raise UserError(
                f"llama.cpp's files of {family_of(a).members} cannot say that {name} "
                f"is {ours!r}; they would mean {theirs!r}. Export the model as a "
                "Hugging Face folder"
            )
