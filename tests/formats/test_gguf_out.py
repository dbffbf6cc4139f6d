"""Files for llama.cpp hold the model and the adapters of a run, number by number."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from exported_models import tiny_tokenizer, with_adapters
from helpers import random_params
from switch_models import SWITCHES

from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError
from research.formats.export_format import ExportedModel, ExportOptions
from research.formats.gguf.gguf_adapter import FORMAT as ADAPTER
from research.formats.gguf.gguf_adapter import packed_factors
from research.formats.gguf.gguf_file import GGUFFile
from research.formats.gguf.gguf_model import FORMAT as MODEL
from research.formats.huggingface.huggingface_weights import read_hf_config
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import used
from research.models.transformer import Model
from research.weights.representations.low_rank import LowRank


def shape_of(name):
    return read_hf_config(SWITCHES / name)


@pytest.fixture(scope="module")
def recorded():
    """Fused matrices."""
    return Model(dataclasses.replace(shape_of("phi3"), head_dim=4, rope_fraction=1.0))


def values_of(leaf):
    return np.asarray(leaf.materialize() if isinstance(leaf, LowRank) else leaf)


def make_exported(model, targets, **knobs):
    config = LoRAConfig(targets=targets, **{"rank": 2, "alpha": 5.0} | knobs)
    return with_adapters(model, random_params(model.specs), config)


def test_a_model_file_is_read_back_with_its_adapters_added(recorded, tmp_path):
    exported = make_exported(recorded, ("attention", "mlp.*kernel"))
    MODEL.write(exported, tmp_path, ExportOptions())
    written = MODEL.read_back(tmp_path, exported)
    assert Model(written.architecture).specs.keys() == recorded.specs.keys()
    for path, spec in recorded.specs.items():
        index = (1,) if spec.stacked else ()
        ours = values_of(exported.weights[path])[index]
        theirs = written.read(path, index)
        np.testing.assert_allclose(theirs, ours, atol=1e-6, err_msg=path)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    texts = ["a cat, 12!", "the\n\nhat"]
    found = written.tokenizer.encode_texts(texts)
    assert found == exported.tokenizer.encode_texts(texts)
    assert {*written.tokenizer.end_ids} == {*exported.tokenizer.end_ids}


def test_an_adapter_file_is_read_back_as_what_it_adds(recorded, tmp_path):
    """Scales that differ by path are multiplied into B; fused matrices share one."""
    knobs = {"rank_pattern": ("query=3",), "alpha_pattern": ("value=7", "mlp=1")}
    exported = make_exported(recorded, ("query.kernel", "value.kernel", "mlp"), **knobs)
    chats = exported.tokenizer.with_chat_template("{{ messages[0].content }}")
    exported = dataclasses.replace(exported, tokenizer=chats)
    ADAPTER.write(exported, tmp_path, ExportOptions())
    file = GGUFFile(tmp_path / "adapter.gguf", "adapter")
    said = {key: file.metadata[key] for key in ("general.type", "adapter.type")}
    assert said == {"general.type": "adapter", "adapter.type": "lora"}
    assert file.metadata["research.base_hash"] == "d5d56f"
    modelfile = (tmp_path / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n")
    assert (tmp_path / "chat_template.jinja").read_text() == chats.chat_template
    usage = ADAPTER.usage(exported, ExportOptions())
    assert "--chat-template-file THIS_FOLDER/chat_template.jinja" in usage
    assert "convert_hf_to_gguf.py FOLDER_OF_THE_BASE --outfile base.gguf" in usage
    of_gguf = dataclasses.replace(exported, facts={"base_model": "pkg://x/y.gguf"})
    usage = ADAPTER.usage(of_gguf, ExportOptions())
    assert "cp FOLDER_OF_THE_BASE/y.gguf base.gguf" in usage
    written = ADAPTER.read_back(tmp_path, exported)
    for path in ("query", "key", "value"):
        path = f"layers.attention.{path}.kernel"
        leaf = exported.weights[path]
        ours = np.array(leaf.update())[1] if isinstance(leaf, LowRank) else 0
        np.testing.assert_allclose(written.read(path, (1,)), ours, atol=1e-6)
    names = {name.partition(".weight")[0] for name in file.shapes()}
    assert all(name.startswith("blk.") for name in names)


def test_one_scale_for_all_leaves_factors_as_they_are(tmp_path):
    model = Model(shape_of("qwen3"))
    exported = make_exported(model, ("down",))
    ADAPTER.write(exported, tmp_path, ExportOptions())
    file, path = (
        GGUFFile(tmp_path / "adapter.gguf", "adapter"),
        "layers.mlp.down.kernel",
    )
    factors = {k: np.asarray(v) for k, v in exported.adapters[path].factors.items()}
    name = "blk.2.ffn_down.weight"
    np.testing.assert_array_equal(file.read(f"{name}.lora_a"), factors["a"][2].T)
    np.testing.assert_array_equal(file.read(f"{name}.lora_b"), factors["b"][2].T)
    assert file.metadata["adapter.lora.alpha"] == 5.0


@pytest.mark.parametrize("name", ["granite", "gpt2", "gpt_neox", "phi3"])
def test_factors_multiply_to_the_update_of_each_tensor(name):
    """In the order of rows of the file, whatever a family fuses or permutes."""
    recorded = Model(shape_of(name))
    specs = recorded.specs
    rng = np.random.default_rng(0)
    for stored in used(family_of(recorded.architecture).gguf_tensors, specs):
        if not specs[stored.paths[0]].n_in:
            continue
        factors, scales, updates = {}, {}, []
        for rank, path in enumerate(stored.paths, 2):
            spec = specs[path]
            inputs = spec.shape[spec.stacked : spec.stacked + spec.n_in]
            outputs = spec.shape[spec.stacked + spec.n_in :]
            a = rng.normal(size=(*inputs, rank)).astype(np.float32)
            b = rng.normal(size=(rank, *outputs)).astype(np.float32)
            factors[path], scales[path] = (a, b), 0.3 * rank
            updates.append(scales[path] * np.tensordot(a, b, 1))
        expected = stored.pack(updates, specs)
        a, b = packed_factors(stored, factors, scales, 1.7, specs)
        scale = 1.7 / b.shape[-1]
        found = scale * (b @ a if stored.transposed else a @ b.T)
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=stored.name)


def test_codes_are_those_of_the_file(tmp_path):
    """A row of 16 numbers is no whole block, so it stays in half precision."""
    model = Model(shape_of("qwen3"))
    exported = make_exported(model, ("down",))
    MODEL.write(exported, tmp_path, ExportOptions(quant="q8_0"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.attn_output.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert GGUFFile(tmp_path / "model.gguf").metadata["general.file_type"] == 7
    read = MODEL.read_back(tmp_path, exported).read
    path = "layers.attention.output.kernel"
    ours = np.asarray(exported.weights[path])[1]
    error = np.abs(read(path, (1,)) - ours).max()
    assert 0 < error < np.abs(ours).max() / 120


@pytest.mark.parametrize(
    "name, targets, said",
    [
        ("gpt2", ("position",), "skips an adapter of position_embedding"),
        ("gpt2", ("^embedding",), "cannot adapt embeddings that are the vocabulary"),
    ],
)
def test_an_adapter_that_llama_cpp_cannot_use_is_refused(name, targets, said, tmp_path):
    model = Model(shape_of(name))
    with pytest.raises(UserError, match=said):
        ADAPTER.write(make_exported(model, targets), tmp_path, ExportOptions())


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("olmoe", {"kv_heads": 2}, "2 heads of keys for 4 of queries"),
        ("gpt_neox", {"tied_head": True}, "a head that is tied"),
        ("gpt_neox", {"biases": ("mlp",)}, "attention that has no biases"),
    ],
)
def test_a_shape_at_which_llama_cpp_stops_is_refused(name, changes, said, tmp_path):
    shape = dataclasses.replace(shape_of(name), **changes)
    exported = ExportedModel(Model(shape), {}, tiny_tokenizer())
    with pytest.raises(UserError, match=said):
        MODEL.write(exported, tmp_path, ExportOptions())
    assert not [*tmp_path.iterdir()]


def test_a_run_without_adapters_has_no_adapter_file(tmp_path):
    model = Model(shape_of("qwen3"))
    params = jax.eval_shape(lambda: random_params(model.specs))
    exported = ExportedModel(model, params, tiny_tokenizer())
    with pytest.raises(UserError, match="trained all parameters"):
        ADAPTER.write(exported, tmp_path, ExportOptions())
