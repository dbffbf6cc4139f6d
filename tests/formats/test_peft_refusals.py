"""Adapter folders that are read with care: other layouts, other bases, damage."""

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest
from peft_exports import ADAPTERS, adapters_of, export_of, model_of, write_adapter

from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError
from research.formats.peft import adapter_config
from research.formats.peft.adapter_config import FIELDS, NO_EFFECT
from research.formats.peft.adapter_config import REFUSED as REFUSED_HERE
from research.formats.peft.adapter_folder import AdapterFolder

LORA_FIELDS = ADAPTERS.parent / "lora_fields.json"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
TABLE = "base_model.model.model.embed_tokens"


@pytest.fixture(scope="module")
def llama():
    """A model with tied embeddings, and the export of its adapters."""
    model = model_of("qwen2_window")
    factors, scales = adapters_of(model)
    return model, factors, scales, *export_of(model, factors, scales)


@pytest.fixture
def opened(llama, tmp_path):
    """Opens the export after `change(tensors, config)`."""
    model, _, _, tensors, config = llama

    def open_changed(change=lambda tensors, config: None):
        changed = dict(tensors), dict(config)
        folder = write_adapter(tmp_path / "adapter", *(change(*changed) or changed))
        return AdapterFolder(folder, model.architecture, model.specs)

    return open_changed


def renamed(change):
    return lambda tensors, config: ({change(k): x for k, x in tensors.items()}, config)


SAME = {
    "no prefix": renamed(lambda key: key.removeprefix("base_model.model.")),
    "name of the adapter": renamed(
        lambda key: re.sub(r"(lora_\w+)", r"\1.default", key)
    ),
    "bfloat16": lambda tensors, config: (
        {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}, config
    ),
    "head not repeated": lambda tensors, config: (
        {k: x for k, x in tensors.items() if ".lm_head." not in k}, config
    ),
    "head not marked": lambda tensors, config: (
        tensors, {k: x for k, x in config.items() if k != "ensure_weight_tying"}
    ),
    "fields without effect": lambda tensors, config: config.update(
        use_dora=False, lora_bias=False, trainable_token_indices=None, bias="none",
        layers_to_transform=[0], init_lora_weights="mica", a_field_of_2030=None,
        megatron_core="megatron.core", qalora_group_size=16, velora_config={"scale": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_other_spellings_are_the_same_adapter(llama, opened, change):
    _, factors, scales, *_ = llama
    adapter = opened(change)
    for path, own in factors.items():
        read = adapter.factors(path)
        np.testing.assert_array_equal(read["a"], own["a"])
        scaled = read["b"] * np.float32(adapter.scales[path])
        np.testing.assert_array_equal(scaled, own["b"] * np.float32(scales[path]))


def test_layers_may_differ_in_rank_scale_and_presence(llama, tmp_path):
    """The largest rank holds all, and the quotient of scales is in the factor b."""
    model, path = llama[0], "layers.attention.query.kernel"
    rng = np.random.default_rng(3)
    spec = model.specs[path]
    layers, embed, out = spec.shape[0], spec.shape[1], spec.shape[2] * spec.shape[3]
    ranks, alphas = {0: 2, 2: 5}, {0: 6, 2: 20}
    tensors, expected = {}, np.zeros((layers, embed, out))
    for layer, rank in ranks.items():
        name = FIRST.replace(".0.", f".{layer}.")
        a, b = rng.normal(size=(rank, embed)), rng.normal(size=(out, rank))
        tensors |= {f"{name}.lora_A.weight": np.float32(a)}
        tensors |= {f"{name}.lora_B.weight": np.float32(b)}
        expected[layer] = alphas[layer] / np.sqrt(rank) * (b @ a).T
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 1, "use_rslora": True,
        # The first that matches counts, and it must match from a dot on.
        "rank_pattern": {"ayers.2.*": 9, r"2\.self_attn\.q_proj": 5, ".*": 2},
        "alpha_pattern": {r"layers\.[01]\..*": 6, "q_proj": 20},
    }  # fmt: skip
    folder = write_adapter(tmp_path / "adapter", tensors, config)
    adapter = AdapterFolder(folder, model.architecture, model.specs)
    assert adapter.ranks == {path: 5}
    lora = adapter.lora_config(LoRAConfig())
    assert (lora.rank, lora.targets) == (5, (r"^layers\.attention\.query\.kernel$",))
    assert np.isclose(lora.alpha / lora.rank, adapter.scales[path], rtol=1e-12)
    factors = adapter.factors(path)
    found = factors["a"] @ factors["b"].reshape(layers, 5, out) * adapter.scales[path]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not factors["a"][1].any() and not factors["b"][0, 2:].any()
    # The padding is not written again, and the layer without an adapter has none.
    again, written = export_of(model, {path: factors}, adapter.scales)
    shapes = {key: x.shape for key, x in again.items()}
    assert shapes == {key: x.shape for key, x in tensors.items()}
    assert written["r"] == 5 and [*written["rank_pattern"].values()] == [2]


def test_numbers_that_only_rslora_makes_whole_are_written_so(llama):
    model, path = llama[0], "layers.mlp.up.kernel"
    factors = {"a": np.ones((3, 16, 8)), "b": np.ones((3, 8, 24))}
    _, config = export_of(model, {path: factors}, {path: 32 / 8**0.5})
    assert (config["lora_alpha"], config["r"], config["use_rslora"]) == (32, 8, True)
    _, config = export_of(model, {path: factors}, {path: 2.0})
    assert (config["lora_alpha"], config.get("use_rslora")) == (16, None)


def put(**fields):
    return lambda tensors, config: config.update(fields)


def tensor(key, value):
    return lambda tensors, config: tensors.update({key: np.float32(value)})


def dropped(part):
    return lambda tensors, config: (
        {k: x for k, x in tensors.items() if part not in k}, config
    )  # fmt: skip


A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
REFUSED = {
    "DoRA": (put(use_dora=True), "lacks its lora_magnitude_vector"),
    "bias": (put(lora_bias=True), "lora_bias is True"),
    "biases": (put(bias="some"), "bias is 'some', and PEFT has none, all, lora_only"),
    "aLoRA": (put(alora_invocation_tokens=[5]), "alora_invocation_tokens is [5]"),
    "QALoRA": (put(use_qalora=True), "use_qalora is True"),
    "BD-LoRA": (put(use_bdlora={"nblocks": 2}), "use_bdlora is"),
    "copies": (put(layer_replication=[[0, 2], [1, 3]]), "layer_replication is"),
    "tokens": (put(trainable_token_indices=[1]), "trainable_token_indices is [1]"),
    "field of 2030": (put(a_field_of_2030=7), "a_field_of_2030 is 7, a field that is"),
    "PiSSA": (put(init_lora_weights="pissa_niter_4"), "over a changed base"),
    "another kind": (put(peft_type="LOHA"), "peft_type is 'LOHA', and only LORA"),
    "no rank": (put(r=0), "r is 0; it must be above 0"),
    "text for a rank": (put(r="8"), "it.r is '8', not int"),
    "bad pattern": (put(rank_pattern={"(": 4}), "which is no regular expression"),
    "pattern of texts": (put(alpha_pattern={"q": "4"}), "alpha_pattern.q is '4', not"),
    "magnitude": (
        tensor(f"{FIRST}.lora_magnitude_vector", np.ones(16)), "does not say use_dora"
    ),
    "other inputs": (tensor(A, np.ones((2, 64))), "is [2, 64], and it needs [2, 16]"),
    "other outputs": (tensor(B, np.ones((9, 2))), "is [9, 2], and it needs [16, 2]"),
    "other rank": (tensor(A, np.ones((7, 16))), "has rank 7, and adapter_config.json"),
    "one axis": (tensor(A, np.ones(16)), f"{A} is [16], and it needs [2, 16]"),
    "more layers": (
        tensor(A.replace(".0.", ".3."), np.ones((2, 16))), "layers.3.self_attn.q_proj"
    ),
    "half": (dropped(B), "layers.0.self_attn.q_proj lacks its lora_B"),
    "nothing": (lambda tensors, config: ({}, config), "holds no lora_A and lora_B"),
    "no parameter": (tensor("base_model.model.visual.weight", [1]), "is no parameter"),
    "only the lookup": (
        lambda t, c: ({k: x for k, x in t.items() if ".lm_head." not in k},
                      {k: x for k, x in c.items() if k != "ensure_weight_tying"}),
        "changes model.embed_tokens alone",
    ),
    "only the head": (dropped("embed_tokens"), "changes lm_head alone"),
    "ends that differ": (
        tensor("base_model.model.lm_head.lora_A.weight", np.ones((2, 16))),
        "both differently",
    ),
    "codes": (
        lambda t, c: t.update({A: np.ones((2, 16), np.int8)}), "stored as I8, not as"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_that_is_not_computed_here_is_refused(opened, change, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        opened(change)
    assert "adapter_" in str(error.value)  # The file.


def test_parts_that_the_config_names_and_the_file_lacks_are_warned_of(opened, caplog):
    opened()
    opened(lambda t, c: c.update(bias="none", target_modules="regular|expression"))
    assert not caplog.text
    first = FIRST.removeprefix("base_model.model.")

    def without(t, c):
        c["target_modules"] = ["q_proj", "k_proj"]
        return {k: x for k, x in t.items() if not k.startswith(FIRST)}, c

    opened(without)
    assert "no tensors for 1 modules that target_modules" in caplog.text
    assert f"({first})" in caplog.text
    for bias in ("all", "lora_only"):
        caplog.clear()
        opened(put(bias=bias))
        assert (
            f"has no biases, and bias of adapter_config.json is {bias}" in caplog.text
        )


@pytest.mark.parametrize(
    "name", [f"base_model.model.{FIRST}", "layers.0.self_attn.q_proj"]
)
def test_a_prefix_that_is_not_pefts_is_not_called_another_base(opened, name):
    with pytest.raises(UserError, match="other first parts than") as error:
        opened(renamed(lambda key: key.replace(FIRST, name)))
    assert "another base" not in str(error.value)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_an_expression_of_a_stranger_does_not_run_for_ever(opened, field, monkeypatch):
    def change(tensors, config):
        config[field] = {"(.|..|...)+[XY]": 2, **config.get(field, {})}

    monkeypatch.setattr(adapter_config, "MATCHING", 0.1)
    with pytest.raises(UserError, match=r"alpha_pattern .*too long on model\."):
        opened(change)


def test_every_field_of_peft_has_a_place_in_the_table(opened):
    """`make golden` compares the recorded fields with those of the installed PEFT."""
    defaults = json.loads(LORA_FIELDS.read_text())
    assert defaults.keys() == FIELDS.keys()
    opened(lambda tensors, config: (tensors, defaults | config))
    values = {"layer_replication": [[0, 2]], "alora_invocation_tokens": [3, 5]}
    for name in (name for name, kind in FIELDS.items() if kind == REFUSED_HERE):
        with pytest.raises(UserError, match=f"json: {name} is .*, which is not"):
            opened(put(**{name: values.get(name, {"beta": 1})}))
    for name in (name for name, kind in FIELDS.items() if kind == NO_EFFECT):
        opened(put(**{name: {"beta": 1}}))


def test_folders_without_the_right_files_are_refused(llama, tmp_path):
    model, _, _, tensors, config = llama

    def refusal(folder):
        with pytest.raises(UserError) as error:
            AdapterFolder(str(folder), model.architecture, model.specs)
        return str(error.value)

    assert "does not exist" in refusal(tmp_path / "none")
    folder = tmp_path / "outer"
    write_adapter(folder / "inner", tensors, config)
    assert str(folder / "inner") in refusal(folder)
    inner, file = folder / "inner", folder / "inner" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    assert "is not a safetensors file" in refusal(inner)
    file.unlink()
    assert "has no adapter_model.safetensors" in refusal(inner)
    (inner / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    assert "pickled and never read" in refusal(inner)
    file.write_bytes(whole)
    (inner / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be used" in refusal(inner)


class HeldTensors:
    """A file of one tensor of a base model."""

    def __init__(self, name, value):
        self._name, self._value = name, value

    def layout(self, family):
        return family.hf_tensors

    def read(self, name):
        assert name == self._name
        return self._value


@pytest.mark.parametrize(
    "key", ["embed_tokens.base_layer.weight", "embed_tokens.weight",
            "embed_tokens.modules_to_save.weight"]
)  # fmt: skip
def test_whole_parameters_must_be_those_of_the_base(opened, key):
    """PEFT writes targeted embeddings beside their adapters; trained ones differ."""
    table = np.float32(np.random.default_rng(0).normal(size=(64, 16)))
    name = f"base_model.model.model.{key}"
    adapter = opened(lambda t, c: t.update({name: table.astype(np.float16)}))
    base = HeldTensors("model.embed_tokens.weight", table)
    adapter.require_base(base)
    other = HeldTensors("model.embed_tokens.weight", table + 0.1)
    with pytest.raises(UserError, match="modules_to_save nor bias"):
        adapter.require_base(other)
    with pytest.raises(UserError, match=r"is \[64, 8\], and it needs \[64, 16\]"):
        opened(lambda t, c: t.update({name: table[:, :8]}))


def test_a_path_that_no_module_has_is_refused(llama):
    model, factors, scales, *_ = llama
    with pytest.raises(UserError, match="no modules for the adapters of elsewhere"):
        export_of(model, factors, scales | {"elsewhere": 1.0})
    idle = {p: {k: 0 * x for k, x in f.items()} for p, f in factors.items()}
    with pytest.raises(UserError, match="all zero"):
        export_of(model, idle, scales)


def test_dropout_is_the_users_own(opened):
    lora = LoRAConfig(dropout=0.25, init_from="somewhere")
    found = opened().lora_config(lora)
    assert dataclasses.replace(found, **{
        name: getattr(lora, name)
        for name in ("targets", "rank", "alpha", "rank_pattern", "alpha_pattern")
    }) == lora  # fmt: skip
