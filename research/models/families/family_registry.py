"""All families, and the ways to find one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError, nearest
from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import (
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo,
    phi3,
    qwen,
    smollm3,
)
from research.models.families.experts import gpt_oss, mixtral, olmoe, qwen3_moe
from research.models.families.model_family import ModelFamily

# By `model_type`. Where two share llama.cpp's name, a mark tells its files apart, or
# else they are read as the first.
FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        llama.FAMILY, mistral.FAMILY, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA2,
        gemma.GEMMA3, olmo.OLMO2, olmo.OLMO3, phi3.FAMILY, granite.FAMILY,
        smollm3.FAMILY, gpt_neox.FAMILY, gpt2.FAMILY,
        mixtral.FAMILY, qwen3_moe.FAMILY, olmoe.FAMILY,
        gpt_oss.FAMILY,
    )
}  # fmt: skip
# Written as a family of its own: only the text part is read.
FAMILIES["gemma3"] = gemma.MULTIMODAL

# Methods in a `quantization_config` whose codes are read in every family.
QUANTISED_AS = ("bitsandbytes", "awq", "gptq")

_STATE_SPACE = "its layers keep a state in place of keys and values (Mamba)"
_GATED_DELTA = "three of four layers are linear attention with gated deltas"
_GEMMA_4 = "layers share keys and values, and each has embeddings of its own"
_CONVOLUTION = "most of its layers are short convolutions"
_LLAMA_4 = "it attends in chunks, and its experts scale their inputs"
# Known families whose models switches of the Block cannot describe, and the reason.
NOT_COMPUTED = {
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
         "olmo_hybrid"),
        _GATED_DELTA,
    ),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"), _GEMMA_4
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl", "lfm3", "lfm3_vl"), _CONVOLUTION),
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2",
         "falcon_h1", "nemotron_h", "granitemoehybrid"),
        _STATE_SPACE,
    ),
    **dict.fromkeys(("llama4", "llama4_text"), _LLAMA_4),
}  # fmt: skip


def from_hf_config(
    config: Mapping[str, Any], where: str = "config.json"
) -> Architecture:
    """The shape that a Hugging Face `config.json` describes; errors name `where`.

    Raises:
      UserError: no family has its `model_type`, a field is missing or malformed, or
        the model computes something that the Block does not.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in NOT_COMPUTED:
        raise UserError(
            f"{where}: model_type is {kind!r}, which is not computed here: "
            f"{NOT_COMPUTED[kind]}; choose a base model of another family"
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _unknown(f"{where}: model_type is {kind!r}", str(kind), FAMILIES)
    family = FAMILIES[kind]
    for key in ("quantization_config", "compression_config"):
        values = config.get(key)
        method = values.get("quant_method") if isinstance(values, dict) else values
        read = (*QUANTISED_AS, *family.quantised_as)
        if values and (method not in read or key != "quantization_config"):
            raise UserError(
                f"{where}: {key} says that the weights are quantised ({method}), and "
                f"codes of {', '.join(read)} are read; give the model as it was "
                "before, in float32, bfloat16 or float16, or a GGUF file"
            )
    shape = family.from_hf_config(ConfigFields(config, where))
    return dataclasses.replace(shape, family=family.model_type)


def to_hf_config(architecture: Architecture) -> dict[str, Any]:
    """The `config.json` of a shape; undone by `from_hf_config`."""
    return family_of(architecture).to_hf_config(architecture)


def family_of(architecture: Architecture) -> ModelFamily:
    """The family whose files hold models of this shape."""
    return FAMILIES[architecture.family]


def module_names(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """By path of a parameter, the modules of Hugging Face's models that hold it."""
    found: dict[str, tuple[str, ...]] = {}
    for tensor in family_of(architecture).hf_tensors:
        for path in tensor.paths:
            name = tensor.name.removesuffix(".weight").removesuffix(".bias")
            found[path] = (*found.get(path, ()), name)
    return found


def find_gguf_family(metadata: Mapping[str, Any], where: str) -> ModelFamily:
    """The family of a llama.cpp file with these `metadata`.

    Raises:
      UserError: there is none for its `general.architecture`.
    """
    kind = metadata.get("general.architecture")
    known: dict[str, ModelFamily] = {}
    for family in FAMILIES.values():
        name, mark = family.gguf_architecture, family.gguf_mark
        if name == kind and mark and metadata.get(f"{name}.{mark}"):
            return family
        if name and not mark:
            known.setdefault(name, family)
    if not isinstance(kind, str) or kind not in known:
        said = f"{where}: general.architecture is {kind!r}"
        raise _unknown(said, str(kind), known)
    return known[kind]


def _unknown(said: str, name: str, known: Mapping[str, ModelFamily]) -> UserError:
    families = "; ".join(f"{name} ({f.members})" for name, f in known.items())
    return UserError(
        f"{said}{nearest(name, known)}, and no such family is known. The families are: "
        f"{families}. Choose a base model of one of these, or add the family as one "
        "file in research/models/families and a line in family_registry.py"
    )
