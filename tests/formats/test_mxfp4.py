"""Matrices of experts in four bits are read exactly, and damaged ones are named."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.core.errors import UserError
from research.formats.huggingface.huggingface_weights import (
    HuggingFaceWeights,
    read_hf_config,
)
from research.formats.load_parameters import check_tensors
from research.models.families.family_registry import family_of, to_hf_config
from research.models.families.stored_tensor import used
from research.models.presets import preset
from research.models.transformer import Model

EXPERTS = "model.layers.0.mlp.experts."
GATE_UP, DOWN = f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj"


def value(code):
    """A number of E2M1: a sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -size if code & 8 else size


def random_parts(seed, experts, outputs, inputs):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
    return blocks, rng.integers(110, 140, blocks.shape[:-1], np.uint8)


@pytest.fixture
def folder(tmp_path):
    """GPT-OSS with two experts, as it is published; only experts have values."""
    config = to_hf_config(preset("gpt-oss-20b")) | {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention"],
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    architecture = read_hf_config(tmp_path)
    specs = Model(architecture).specs
    tensors = {
        name: np.zeros(stored.shape(specs), np.float32)
        for stored in used(family_of(architecture).hf_tensors, specs)
        for name, _ in stored.names(specs)
    }
    del tensors[GATE_UP], tensors[DOWN]
    for seed, (name, sizes) in enumerate({GATE_UP: (64, 64), DOWN: (64, 32)}.items()):
        blocks, scales = random_parts(seed, 2, *sizes)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def rewrite(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        tensors[EXPERTS + name] = change(tensors[EXPERTS + name])
    save_file(tensors, folder / "model.safetensors")


def test_every_number_is_exact(folder):
    blocks, scales = random_parts(0, 2, 64, 64)
    weights = HuggingFaceWeights(folder)
    check_tensors(weights, Model(read_hf_config(folder)))
    found = weights.read(GATE_UP)
    assert found.shape == (2, 64, 64) == weights.shapes()[GATE_UP]
    for at in ((0, 0, 0), (1, 63, 5), (0, 33, 17), (1, 2, 40)):
        expert, entry, output = at
        byte = int(blocks[expert, output, entry // 32, entry % 32 // 2])
        code = byte >> 4 if entry % 2 else byte & 15
        power = 2.0 ** (int(scales[expert, output, entry // 32]) - 127)
        assert float(found[at]) == value(code) * power
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(2, 64, 64)
    whole = np.vectorize(value)(codes) * np.repeat(2.0 ** (scales - 127.0), 32, -1)
    np.testing.assert_array_equal(found.astype(np.float64), whole.swapaxes(1, 2))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"down_proj_blocks": lambda x: x[..., :8].copy()}, "must be \\[..., 16\\]"),
        ({"down_proj_scales": lambda x: x[:1].copy()}, "is \\[1, 64, 1\\]: they must"),
        (
            {"down_proj_scales": lambda x: x.astype(np.int32)},
            "is stored as I32, not U8",
        ),
        ({"down_proj_scales": lambda x: x * 0 + 255}, "holds 255, which is no number"),
    ],
)
def test_damaged_parts_are_named(folder, changes, said):
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=f"{folder}.*down_proj.*{said}.*download"):
        HuggingFaceWeights(folder).read(DOWN)


def test_other_families_refuse_quantised_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    with pytest.raises(UserError, match="weights are quantised \\(mxfp4\\)"):
        read_hf_config(folder)
