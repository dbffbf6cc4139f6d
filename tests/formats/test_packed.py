"""Folders in codes of bitsandbytes, AWQ and GPTQ are read as their libraries do."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from packed_codes import pack_awq, pack_bitsandbytes, pack_gptq
from safetensors.numpy import load_file, save_file

from research.core.errors import UserError
from research.formats.huggingface.huggingface_weights import (
    HuggingFaceWeights,
    read_hf_config,
)
from research.formats.load_parameters import check_tensors, load_params
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import used
from research.models.transformer import Model
from research.weights.quantized.block_codes import NF4_LEVELS

GOLDEN = Path(__file__).parents[1] / "golden"
SAID = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "awq": {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True},
}
PACK = {
    "bitsandbytes": lambda *args: pack_bitsandbytes(*args, NF4_LEVELS),
    "awq": pack_awq,
    "gptq": pack_gptq,
}


def announce(folder, method, model="llama", **said):
    """Writes the config of a recorded model with codes of `method`."""
    folder.mkdir(exist_ok=True)
    if model == "llama":
        config = json.loads((GOLDEN / "llama2/config.json").read_text())
    else:
        config = json.loads((GOLDEN / f"switches/{model}/config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **SAID[method], **said}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "file", sorted((GOLDEN / "packed").iterdir()), ids=lambda f: f.stem
)
def test_every_number_is_that_of_its_library(tmp_path, file):
    announce(tmp_path, file.stem.split("_")[0])
    tensors = load_file(file)
    expected = tensors.pop("read")
    tensors.pop("weight", None)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = HuggingFaceWeights(tmp_path)
    assert weights.shapes() == {"m.weight": expected.shape}
    found = weights.read("m.weight")
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    rows = slice(3, 7)
    np.testing.assert_array_equal(weights.read_rows("m.weight", rows), expected[rows])


def write(folder, method, model, every=True):
    """A model in codes in `folder`, and as numbers in the folder that comes back."""
    announce(
        folder, method, model, **({"group_size": 8} if method != "bitsandbytes" else {})
    )
    architecture = read_hf_config(folder)
    specs, rng = Model(architecture).specs, np.random.default_rng(0)
    plain, packed = {}, {}
    for stored in used(family_of(architecture).hf_tensors, specs):
        shape = stored.shape(specs)
        is_linear = stored.paths[0].endswith(".kernel") and len(shape) == 2
        for name, index in stored.names(specs):
            drawn = rng.normal(size=shape).astype(np.float32)
            suits = not any(n % 8 for n in shape) and name.endswith(".weight")
            if not (is_linear and suits and (every or index[:1] == (0,))):
                plain[name] = packed[name] = drawn
                continue
            out_in = shape if stored.transposed else shape[::-1]
            found, parts = PACK[method](name.removesuffix(".weight"), out_in, rng)
            packed |= parts
            plain[name] = found.copy() if stored.transposed else found.T.copy()
    other = folder / "plain"
    other.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (other / "config.json").write_text(json.dumps(config))
    save_file(plain, other / "model.safetensors")
    save_file(packed, folder / "model.safetensors")
    assert len(packed) > len(plain)
    return other


def load(folder):
    model = Model(read_hf_config(folder))
    here = dict.fromkeys(
        model.specs, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    return load_params(HuggingFaceWeights(folder), model, here, np.float32)


@pytest.mark.parametrize("method", SAID)
@pytest.mark.parametrize(
    "model", ["llama", *sorted(path.name for path in (GOLDEN / "switches").iterdir())]
)
def test_every_family_is_read(tmp_path, model, method):
    plain = write(tmp_path, method, model)
    expected = load(plain)
    for path, value in load(tmp_path).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_a_folder_may_have_codes_in_some_layers(tmp_path):
    plain = write(tmp_path / "llama", "gptq", "llama", every=False)
    expected = load(plain)
    for path, value in load(plain.parent).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    # The numbers of GPT-2 lie as [in, out], its codes as [out, in].
    write(tmp_path / "gpt2", "gptq", "gpt2", every=False)
    with pytest.raises(UserError, match=r"lies in codes, and .*h\.1.* does not; give"):
        load(tmp_path / "gpt2")


@pytest.mark.parametrize("act_order, with_groups", [(True, True), (False, False)])
def test_gptq_groups_may_be_named_or_left_to_the_config(
    tmp_path, act_order, with_groups
):
    rng = np.random.default_rng(0)
    announce(tmp_path, "gptq", group_size=16)
    made = {"act_order": act_order, "with_groups": with_groups}
    expected, parts = pack_gptq("m", (16, 64), rng, group=16, **made)
    save_file(parts, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        HuggingFaceWeights(tmp_path).read("m.weight"), expected
    )


def test_zeros_of_the_second_gptq_format_are_themselves(tmp_path):
    expected, parts = pack_gptq("m", (16, 64), np.random.default_rng(0))
    # As GPTQModel writes a file in the first format: minus one with a borrow.
    zeros = parts["m.qzeros"].view(np.uint32)
    parts["m.qzeros"] = (zeros + np.uint32(0x11111111)).view(np.int32)
    save_file(parts, tmp_path / "model.safetensors")
    announce(tmp_path, "gptq", checkpoint_format="gptq_v2", group_size=8)
    np.testing.assert_array_equal(
        HuggingFaceWeights(tmp_path).read("m.weight"), expected
    )


def test_a_zero_of_nothing_that_borrowed_is_read_back(tmp_path):
    _, parts = pack_gptq("m", (8, 8), np.random.default_rng(0), with_groups=False)
    parts["m.qzeros"] = np.array([[0x54321000 - 0x11111111]], np.int32)
    save_file(parts, tmp_path / "model.safetensors")
    announce(tmp_path, "gptq", group_size=8)
    matrix = HuggingFaceWeights(tmp_path)._packed["m.weight"].codes()
    assert matrix.zeros[:, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]


def test_codes_of_eight_bits_are_read(tmp_path):
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 256, (16, 8)), rng.integers(1, 256, (2, 8))
    scales = rng.uniform(0.001, 0.01, (2, 8)).astype(np.float16)
    parts = {
        "m.qweight": bytes_in_words(codes.reshape(4, 4, 8).transpose(0, 2, 1)),
        "m.qzeros": bytes_in_words((zeros - 1).reshape(2, 2, 4)),
        "m.scales": scales,
    }
    save_file(parts, tmp_path / "model.safetensors")
    announce(tmp_path, "gptq", bits=8, group_size=8)
    exact = (codes - np.repeat(zeros, 8, 0)) * np.repeat(scales.astype(float), 8, 0)
    found = HuggingFaceWeights(tmp_path).read("m.weight")
    np.testing.assert_array_equal(found, exact.astype(np.float16).T)


def bytes_in_words(codes):
    return np.sum(codes << np.arange(0, 32, 8), -1).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_of_bitsandbytes_may_be_stored_as_floats(tmp_path, dtype):
    rng = np.random.default_rng(0)
    expected, parts = pack_bitsandbytes("m", (8, 40), rng, NF4_LEVELS, nested=False)
    parts["m.weight"] = parts["m.weight"].reshape(-1).view(np.dtype(dtype))[:, None]
    save_file(parts, tmp_path / "model.safetensors")
    announce(tmp_path, "bitsandbytes")
    np.testing.assert_array_equal(
        HuggingFaceWeights(tmp_path).read("m.weight"), expected
    )


def test_a_bias_of_zeros_beside_codes_adds_nothing(tmp_path):
    write(tmp_path, "gptq", "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    model, name = Model(read_hf_config(tmp_path)), "model.layers.0.mlp.up_proj.bias"
    for value, fits in ((0.0, True), (0.5, False)):
        bias = {name: np.full(model.architecture.mlp, value, np.float16)}
        save_file(tensors | bias, tmp_path / "model.safetensors")
        if fits:
            check_tensors(HuggingFaceWeights(tmp_path), model)
            continue
        with pytest.raises(UserError, match=f"{name} is not part of this model"):
            check_tensors(HuggingFaceWeights(tmp_path), model)


@pytest.mark.parametrize(
    "method, said, named",
    [
        ("bitsandbytes", {"load_in_4bit": False, "load_in_8bit": True}, "load_in_8bit"),
        ("bitsandbytes", {"load_in_4bit": None}, "load_in_4bit unset"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"bits": 3}, "bits 3"),
        ("awq", {"zero_point": False}, "zero_point false"),
        ("awq", {"backend": "llm-awq"}, "backend 'llm-awq'"),
        ("awq", {"group_size": "all"}, "group_size 'all'"),
        ("gptq", {"bits": 3}, "bits 3"),
        ("gptq", {"bits": None}, "bits None"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
        ("gptq", {"pack_dtype": "int64"}, "pack_dtype 'int64'"),
        ("gptq", {"group_size": 0}, "group_size 0"),
    ],
)
def test_codes_that_are_not_read_are_named(tmp_path, method, said, named):
    announce(tmp_path, method, **said)
    with pytest.raises(UserError, match=r"GPTQ .*; give the model as it was") as error:
        read_hf_config(tmp_path)
    assert f"{method} with {named} is not read" in str(error.value)


def without(name):
    return lambda tensors: tensors.pop(name)


def changed(name, change):
    return lambda tensors: tensors.update(
        {name: np.ascontiguousarray(change(tensors[name]))}
    )


def state(**fields):
    """Another state with these fields, or without those that are None."""
    name = "m.weight.quant_state.bitsandbytes__nf4"

    def change(old):
        new = json.loads(old.tobytes()) | fields
        text = json.dumps({k: v for k, v in new.items() if v is not None})
        return np.frombuffer(text.encode(), np.uint8)

    return changed(name, change)


@pytest.mark.parametrize(
    "method, damage, said",
    [
        ("awq", without("m.scales"), "m.scales is missing"),
        ("awq", without("m.qzeros"), "m.qzeros is missing"),
        ("awq", changed("m.qweight", lambda x: x.astype(np.int16)), "I16, not I32"),
        ("awq", changed("m.qzeros", lambda x: x[:1]), r"m.qzeros is \[1, 2\], not"),
        ("awq", changed("m.qweight", lambda x: x[:60]), "60 inputs in groups of 8"),
        ("awq", changed("m.scales", lambda x: x.astype(np.int8)), "not F32 or F16"),
        ("gptq", changed("m.g_idx", lambda x: x[:8]), r"m.g_idx is \[8\], not \[64\]"),
        ("gptq", changed("m.g_idx", lambda x: x + 1), "groups 1 to 8, and .* has 8"),
        ("gptq", changed("m.g_idx", lambda x: x - 1), "groups -1 to 6"),
        ("gptq", changed("m.qweight", lambda x: x[:, :3]), "3 outputs, no multiple"),
        ("gptq", changed("m.scales", lambda x: x[:, :3]), r"is \[8, 3\], not \[8, 16"),
        ("gptq", changed("m.qweight", lambda x: x[0]), "must have two axes"),
        ("bitsandbytes", without("m.weight.absmax"), "m.weight.absmax is missing"),
        ("bitsandbytes", without("m.weight"), "m.weight is missing"),
        ("bitsandbytes", without("m.weight.nested_absmax"), "nested_absmax is"),
        ("bitsandbytes", changed("m.weight", lambda x: x[1:]), "has 511 bytes"),
        (
            "bitsandbytes",
            changed("m.weight.quant_map", lambda x: x + 1),
            "other levels",
        ),
        ("bitsandbytes", changed("m.weight.absmax", lambda x: x[:3]), r"is \[3\], not"),
        ("bitsandbytes", state(shape=[16, 65]), r"shape is \[16, 65\] in four"),
        ("bitsandbytes", state(shape=[1024]), "which is no matrix"),
        ("bitsandbytes", state(shape=[-16, -64]), "not positive"),
        ("bitsandbytes", state(blocksize=True), "blocksize True"),
        ("bitsandbytes", state(dtype="int8"), "dtype 'int8'"),
        ("bitsandbytes", state(nested_offset="nan"), "nested_offset 'nan'"),
        ("bitsandbytes", state(nested_blocksize=None), "nested_blocksize None"),
        (
            "bitsandbytes",
            changed("m.weight.quant_state.bitsandbytes__nf4", lambda x: x[:9]),
            "no JSON object",
        ),
    ],
)
def test_damaged_parts_are_named(tmp_path, method, damage, said):
    said_there = {} if method == "bitsandbytes" else {"group_size": 8}
    announce(tmp_path, method, **said_there)
    _, tensors = PACK[method]("m", (16, 64), np.random.default_rng(0))
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said) as error:
        HuggingFaceWeights(tmp_path).read("m.weight")
    assert str(tmp_path) in str(error.value) and "m." in str(error.value)
    assert "download or write" in str(error.value)


def test_a_matrix_that_is_there_twice_is_refused(tmp_path):
    announce(tmp_path, "awq", group_size=8)
    _, tensors = pack_awq("m", (16, 64), np.random.default_rng(0))
    tensors["m.weight"] = np.zeros((16, 64), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"m.weight is there as numbers, and once more"):
        HuggingFaceWeights(tmp_path)


def test_codes_without_a_word_in_the_config_are_named(tmp_path):
    _, tensors = pack_awq("m", (16, 64), np.random.default_rng(0))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no quantization_config that says which"):
        HuggingFaceWeights(tmp_path)
