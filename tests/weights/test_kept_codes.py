"""Frozen matrices stay in the codes of their file, and are the same numbers."""

import dataclasses
import json
import logging
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import gguf_tensors
from helpers import random_adapters, random_params
from packed_codes import pack_awq, pack_bitsandbytes, pack_gptq
from safetensors.numpy import save_file

from configs import finetune_dolly
from research.config.knob_groups import LoRAConfig, ModelConfig
from research.config.run_config import MeshConfig, from_config_dict
from research.core.errors import UserError
from research.formats.base_model import Base
from research.formats.gguf.block_layouts import LAYOUTS, unpack_blocks
from research.formats.gguf.gguf_file import GGUFFile
from research.formats.gguf.metadata_fields import write_metadata
from research.formats.huggingface.huggingface_weights import (
    HuggingFaceWeights,
    read_hf_config,
)
from research.formats.kept_tensors import kept_kinds, require_kept
from research.formats.load_parameters import load_base, load_frozen
from research.models.families.family_registry import family_of, from_hf_config
from research.models.families.stored_tensor import used
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.plan import planner
from research.plan.planned_devices import parse_device
from research.weights import parameter_paths, trainable
from research.weights.contraction import lookup, materialize
from research.weights.quantized.block_codes import NF4_LEVELS
from research.weights.quantized.kept_codes import KeptMatrix, _rounded

TYPES = gguf.GGMLQuantizationType
SWITCHES = Path(__file__).parents[1] / "golden" / "switches"
ONE = meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
WIDE = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
# Every family with another layout of files: turned heads, fused matrices, experts.
FAMILIES = {
    "llama": {},
    "phi3": {"pad_token_id": None},
    "gpt_neox": {"rotary_pct": 0.5, "tie_word_embeddings": False},
    "gpt2": {
        "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 40, "n_inner": 96,
    },
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7,
               "hidden_activation": "gelu_pytorch_tanh"},
    "mixtral": {"num_local_experts": 4, "sliding_window": None,
                "tie_word_embeddings": False},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "moe_intermediate_size": 32, "head_dim": 16,
    },
}  # fmt: skip


def random_blocks(name, shape, seed=0):
    """Bytes of a type, with float16 scales that are no infinity and no NaN."""
    layout, rng = LAYOUTS[name], np.random.default_rng(seed)
    rows = rng.integers(0, 256, (*shape[:-1], shape[-1] // layout.numbers, layout.size))
    rows = rows.astype(np.uint8)
    places = {"Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82]}.get(name, [0])
    places = [0, 2] if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else places
    for at in places:
        scales = rng.normal(0, 0.01, rows.shape[:-1]).astype("<f2")
        rows[..., at : at + 2] = scales[..., None].view(np.uint8)
    return rows.reshape(*shape[:-1], -1)


def write_file(file, architecture, type_of):
    """A llama.cpp file; `type_of` gives the type of each matrix, or None."""
    model = Model(architecture)
    writer = gguf.GGUFWriter(file, family_of(architecture).gguf_architecture)
    for key, value in write_metadata(architecture).items():
        if key != "general.architecture":
            kinds = {int: "uint32", float: "float32", bool: "bool", str: "string"}
            getattr(writer, f"add_{kinds.get(type(value), 'array')}")(key, value)
    params = random_params(model.specs)
    for seed, (name, value) in enumerate(gguf_tensors(model, params).items()):
        kind = type_of(name) if value.ndim > 1 and name.endswith(".weight") else None
        if kind is None or value.shape[-1] % LAYOUTS[kind].numbers:
            writer.add_tensor(name, value)
            continue
        blocks = random_blocks(kind, value.shape, seed)
        writer.add_tensor(name, blocks, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def split_of(tensors, architecture, dtype=jnp.bfloat16, **lora):
    model = Model(architecture)
    kept = kept_kinds("keep", tensors, architecture, model.specs)
    config = ModelConfig(quantize="keep", dtype=jnp.dtype(dtype).name)
    split = trainable.make("lora", config, LoRAConfig(**lora), model.specs, kept)
    return model, split, kept


def load(tensors, architecture, mesh=ONE, dtype=jnp.bfloat16):
    """Kept and plain parameters of a file, and the kinds that are kept."""
    model, split, kept = split_of(tensors, architecture, dtype)
    base = Base("a file", architecture, None, tensors)
    frozen = load_frozen(base, model, mesh, split, 0)
    return frozen, load_base(base, model, ONE, dtype, 0), kept


def assert_same_numbers(frozen, plain, kept):
    """In the dtype of the computation, also where a compiler fuses."""
    decoded = jax.jit(
        lambda params: {path: materialize(x) for path, x in params.items()}
    )(frozen)
    for path, value in plain.items():
        assert isinstance(frozen[path], KeptMatrix) == (path in kept), path
        found = np.asarray(decoded[path].astype(value.dtype), np.float32)
        np.testing.assert_array_equal(found, np.asarray(value, np.float32), path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_stand_for_the_numbers_that_llama_cpp_computes(name):
    rows = random_blocks(name, (6, 768))
    expected = gguf.dequantize(rows, TYPES[name])
    np.testing.assert_array_equal(unpack_blocks(LAYOUTS[name], rows).decode(), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_of_files_keeps_its_numbers(tmp_path, name):
    config = WIDE | {"model_type": name} | FAMILIES[name]
    architecture = from_hf_config(config)
    file = write_file(
        tmp_path / "x.gguf",
        architecture,
        lambda name: "Q8_0" if name.startswith("token_embd") else "Q4_1",
    )
    frozen, plain, kept = load(GGUFFile(file), architecture)
    assert_same_numbers(frozen, plain, kept)
    matrices = {p for p in plain if p.endswith(".kernel") and "router" not in p}
    assert kept.keys() == matrices | {"embedding.table"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """As llama.cpp mixes types: some matrices have another one in some layers."""
    config = WIDE | {"hidden_size": 256, "intermediate_size": 256}
    architecture = from_hf_config(config)
    types = {
        "attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q3_K", "attn_output": "Q5_0",
        "ffn_up": "Q2_K", "ffn_gate": "Q4_0", "token_embd": "Q6_K",
    }  # fmt: skip

    def type_of(name):
        if "ffn_down" in name:
            return "Q4_K" if name.startswith("blk.0") else "Q6_K"
        return next((kind for own, kind in types.items() if own in name), None)

    file = tmp_path_factory.mktemp("mixed") / "x.gguf"
    return write_file(file, architecture, type_of), architecture


def test_types_may_differ_from_matrix_to_matrix_and_from_layer_to_layer(mixed):
    file, architecture = mixed
    frozen, plain, kept = load(GGUFFile(file), architecture)
    assert_same_numbers(frozen, plain, kept)
    assert kept["layers.mlp.down.kernel"].name == "q4_k+q6_k"
    assert {kind.bits for kind in kept.values()} == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"tensor": 2, "fsdp": 2}], ids=str)
def test_a_mesh_splits_codes_as_it_does_the_matrix(mixed, sizes):
    file, architecture = mixed
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    mesh = meshes.make_mesh(MeshConfig(data=1, **sizes), devices)
    frozen, plain, kept = load(GGUFFile(file), architecture, mesh)
    assert_same_numbers(frozen, plain, kept)
    leaf = frozen["layers.attention.query.kernel"]
    for array in (*leaf.planes, leaf.scales, leaf.offsets):
        assert array.addressable_shards[0].data.size * len(devices) == array.size
    ids = jnp.array([5, 0, 95])
    rows = jax.jit(lambda table: lookup(table, ids, jnp.float32))
    expected = materialize(frozen["embedding.table"])[ids]
    np.testing.assert_array_equal(rows(frozen["embedding.table"]), expected)


def test_a_mesh_that_would_split_a_block_is_refused(tmp_path):
    architecture = from_hf_config(WIDE)
    file = GGUFFile(write_file(tmp_path / "x", architecture, lambda name: "Q8_0"))
    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    said = r"table\.scales: axis 'embed' of size 2 does not divide over fsdp=4"
    with pytest.raises(UserError, match=said):
        load(file, architecture, mesh)


def test_loss_and_gradients_are_those_of_the_numbers(tmp_path):
    architecture = from_hf_config(WIDE | {"num_hidden_layers": 1})
    file = GGUFFile(write_file(tmp_path / "x", architecture, lambda name: "Q4_1"))
    frozen, plain, _ = load(file, architecture, dtype=jnp.float32)
    lora = {"rank": 2, "targets": ("attention", "mlp")}
    model, split, _ = split_of(file, architecture, **lora)
    model = model.with_options(dtype=jnp.float32)
    params = random_adapters(split.specs)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)

    @jax.jit
    def run(params, base):
        def loss(params):
            weights = split.forward(params, base, None)
            hidden = model.hidden(weights, tokens, places, np.ones_like(tokens))
            return jnp.mean(model.logits(weights, hidden) ** 2)

        return jax.value_and_grad(loss)(params)

    value, gradient = run(params, frozen)
    expected, other = run(params, plain)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for found, right in zip(*map(jax.tree.leaves, (gradient, other)), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-6)
        assert np.abs(right).max() > 0


def test_matrices_that_train_are_arrays_and_the_rest_is_codes(mixed):
    file, architecture = mixed
    _, split, _ = split_of(GGUFFile(file), architecture, full=("embeddings",))
    assert not isinstance(split.frozen_specs["embedding.table"], KeptMatrix)
    assert isinstance(split.frozen_specs["layers.mlp.up.kernel"], KeptMatrix)


def test_numbers_of_a_file_stay_numbers_and_are_named(tmp_path, caplog):
    architecture = from_hf_config(WIDE)
    file = write_file(
        tmp_path / "x", architecture, lambda name: "Q4_0" if "ffn_up" in name else None
    )
    with caplog.at_level(logging.INFO):
        frozen, plain, kept = load(GGUFFile(file), architecture)
    assert kept.keys() == {"layers.mlp.up.kernel"}
    assert_same_numbers(frozen, plain, kept)
    assert "codes of the file are kept in 1 q4_0 matrices" in caplog.text
    assert "layers.mlp.gate.kernel are not codes of one type" in caplog.text
    assert "stay bfloat16" in caplog.text
    assert parameter_paths.count(frozen) == parameter_paths.count(plain)


def test_a_base_without_codes_is_refused(tmp_path):
    architecture = from_hf_config(WIDE)
    file = GGUFFile(write_file(tmp_path / "x", architecture, lambda name: None))
    _, _, kept = split_of(file, architecture)
    with pytest.raises(UserError, match=r"/x holds no matrix in codes .*; use .*nf4"):
        require_kept("keep", file, kept)
    with pytest.raises(UserError, match=r"random weights holds no matrix in codes"):
        require_kept("keep", None, {})
    require_kept("nf4", None, {})


def test_a_scale_that_is_not_finite_is_named(tmp_path):
    architecture = from_hf_config(WIDE)
    file = write_file(tmp_path / "x", architecture, lambda name: "Q4_1")
    found = GGUFFile(file)
    matrix = found.codes("blk.1.ffn_up.weight")
    matrix = dataclasses.replace(matrix, offsets=matrix.offsets * np.float16(np.nan))
    found.codes = lambda name: matrix
    with pytest.raises(UserError, match=r"x: .* has values that are NaN or infinite"):
        load(found, architecture)


def test_a_type_that_is_not_read_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x", "llama")
    rows = np.zeros((2, gguf.GGML_QUANT_SIZES[TYPES.Q8_K][1]), np.uint8)
    writer.add_tensor("m", rows, raw_dtype=TYPES.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(tmp_path / "x")
    assert found.block_kind("m") is None
    with pytest.raises(UserError, match=r"m is stored as Q8_K, .* F16, .*Q4_1, .*Q6_K"):
        found.read("m")


def test_the_planner_reads_the_types_in_the_file(mixed):
    file, architecture = mixed

    def plan(start, quantize):
        values = finetune_dolly.get_config()
        values.model.update(init_from=str(start), quantize=quantize)
        config = from_config_dict(values)
        return planner.plan_estimate(config, architecture, parse_device("24GB"))

    kept, plain = plan(file, "keep"), plan(file, "none")
    _, split, _ = split_of(GGUFFile(file), architecture)
    size = sum(
        np.prod(x.shape) * jnp.dtype(x.dtype or "bfloat16").itemsize
        for x in jax.tree.leaves(split.frozen_specs)
    )
    assert kept.memory.frozen == size < 0.6 * plain.memory.frozen
    assert {"q4_k", "q6_k", "q4_k+q6_k", "bfloat16"} <= kept.frozen_forms.keys()
    with pytest.raises(UserError, match="keep is planned by the types in the file"):
        plan("hub://a/b", "keep")


def write_folder(folder, pack, model="qwen3", **said):
    """A recorded model whose kernels `pack` packs; other dimensions than recorded."""
    config = json.loads((SWITCHES / model / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    config["quantization_config"] = said
    (folder / "config.json").write_text(json.dumps(config))
    architecture = read_hf_config(folder)
    specs, rng = Model(architecture).specs, np.random.default_rng(0)
    tensors = {}
    for stored in used(family_of(architecture).hf_tensors, specs):
        for name, _ in stored.names(specs):
            shape = stored.shape(specs)
            if stored.paths[0].endswith(".kernel") and name != "lm_head.weight":
                tensors |= pack(name.removesuffix(".weight"), shape, rng)[1]
            else:
                tensors[name] = rng.normal(size=shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return HuggingFaceWeights(folder), architecture


NAMED = {
    "bitsandbytes": (
        lambda *args: pack_bitsandbytes(*args, NF4_LEVELS),
        {"load_in_4bit": True},
    ),
    "awq": (lambda *args: pack_awq(*args, 16), {"bits": 4, "group_size": 16}),
    "gptq": (lambda *args: pack_gptq(*args, 16), {"bits": 4, "group_size": 16}),
}


@pytest.mark.parametrize("method", NAMED)
def test_folders_in_codes_keep_theirs(tmp_path, method):
    pack, said = NAMED[method]
    tensors, architecture = write_folder(tmp_path, pack, quant_method=method, **said)
    frozen, plain, kept = load(tensors, architecture)
    assert_same_numbers(frozen, plain, kept)
    assert len(kept) == 7 and "head.kernel" not in kept


def test_groups_that_are_no_blocks_are_refused(tmp_path):
    def pack(*args):
        return pack_gptq(*args, 16, act_order=True)

    said = {"bits": 4, "group_size": 16}
    tensors, architecture = write_folder(tmp_path, pack, quant_method="gptq", **said)
    said = r"gptq\) of model\.layers\.0\..*a scale for each 1 inputs.*quantize=nf4"
    with pytest.raises(UserError, match=said):
        split_of(tensors, architecture)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_rounded_as_a_cast_rounds_them(dtype):
    rng = np.random.default_rng(0)
    exponents = rng.uniform(-26, 15, 4096)
    numbers = (rng.choice([-1, 1], 4096) * 2.0**exponents).astype(np.float32)
    halfway = np.arange(-64, 64, dtype=np.float32) * np.float32(2.0**-25)
    numbers = np.concatenate([numbers, halfway, [0.0, 2.0**-14]]).astype(np.float32)
    expected = numbers.astype(jnp.dtype(dtype)).astype(np.float32)
    found = jax.jit(lambda x: _rounded(x, dtype))(numbers)
    np.testing.assert_array_equal(found, expected)
