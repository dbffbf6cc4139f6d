"""The export format `peft`: what it writes is what the run computes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_model
from helpers import random_adapters, random_params
from peft_exports import adapters_of, model_of
from safetensors import safe_open

from research.config.knob_groups import LoRAConfig, ModelConfig
from research.core.errors import UserError
from research.formats.base_model import open_base
from research.formats.export_format import (
    ExportedAdapter,
    ExportedModel,
    ExportOptions,
    find_format,
)
from research.formats.peft.adapter_folder import AdapterFolder
from research.models.transformer import Model
from research.weights import trainable

FORMAT = find_format("peft")
HUB = "hub://owner/name@0123456789012345678901234567890123456789"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model with adapters, as if trained for a while."""
    folder = tmp_path_factory.mktemp("peft") / "model"
    base = open_base(str(tiny_model.make_tiny_model(folder)))
    model = Model(base.architecture)
    lora = LoRAConfig(rank=2, rank_pattern=("down=3",), targets=("attention", "down"))
    split = trainable.make("lora", ModelConfig(), lora, model.specs)
    params, frozen = random_adapters(split.specs), random_params(model.specs)
    ranks = {path: split.kind.rank(factors) for path, factors in params.items()}
    scales = split.kind.settings(ranks, lora).scales
    return ExportedModel(
        model,
        split.forward(params, frozen, None),
        base.tokenizer,
        {
            path: ExportedAdapter(factors, ranks[path], scales[path] * ranks[path])
            for path, factors in params.items()
        },
        "lora",
        frozen,
        base,
        {"base_model": HUB, "step": "7"},
    )


@pytest.mark.parametrize("dtype, near", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_the_files_hold_what_the_run_computes(exported, tmp_path, dtype, near):
    FORMAT.write(exported, tmp_path, ExportOptions(dtype))
    written = FORMAT.read_back(tmp_path, exported)
    assert written.architecture == exported.model.architecture
    assert written.held.keys() == exported.adapters.keys()
    assert {x.kind for x in written.held.values()} == {dtype}
    for path in written.held:
        spec, update = exported.model.specs[path], exported.weights[path].update()
        for layer in range(spec.shape[0] if spec.stacked else 1):
            index = (layer,) if spec.stacked else ()
            ours, found = np.array(update[index]), written.read(path, index)
            assert found.dtype == np.float32 and np.abs(found).max() > 1e-3
            np.testing.assert_allclose(found, ours, atol=near * np.abs(ours).max())
    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", **exported.facts}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["revision"] == HUB.partition("@")[2]
    assert config["r"] == 3 and config["lora_alpha"] == 48
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "name, said",
    [
        (HUB, f'"owner/name", revision="{HUB.partition("@")[2]}", dtype'),
        ("hub://owner/name", '("owner/name", dtype'),
        ("pkg://package/base.gguf", '"FOLDER_OF_THE_BASE", gguf_file="base.gguf", d'),
        ("model", '("FOLDER_OF_THE_BASE", dtype'),
    ],
)
def test_the_card_says_how_other_tools_get_the_base(exported, tmp_path, name, said):
    """The config names a base only where a name is enough to find it."""
    found = dataclasses.replace(exported, facts={"base_model": name})
    usage = FORMAT.usage(found, ExportOptions())
    assert said in usage and f"# Trained on {name}\n" in usage
    compile(usage.removeprefix("```python").removesuffix("```"), "usage", "exec")
    FORMAT.write(found, tmp_path, ExportOptions())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ("base_model_name_or_path" in config) == name.startswith("hub://")


@pytest.mark.parametrize("tied", [False, True])
def test_the_card_warns_of_a_merge_that_adds_to_one_table_twice(exported, tied):
    shape = dataclasses.replace(exported.model.architecture, tied_head=tied)
    found = dataclasses.replace(
        exported, model=Model(shape), full=frozenset({"embedding.table"})
    )
    assert ("PEFT 0.21 adds it" in FORMAT.usage(found, ExportOptions())) == tied


def test_a_run_without_adapters_is_refused(exported, tmp_path):
    full = dataclasses.replace(exported, adapters={}, adapter_kind="")
    with pytest.raises(UserError, match="trained all its parameters: use --format=hf"):
        FORMAT.write(full, tmp_path, ExportOptions())
    assert not [*tmp_path.iterdir()]


def test_whole_parameters_are_written_beside_adapters(exported, tmp_path):
    full = {"final_norm.scale", "embedding.table", "layers.mlp_norm.scale"}
    moved = {path: exported.base_weights[path] + 0.5 for path in full}
    whole = dataclasses.replace(
        exported, full=frozenset(full), weights=exported.weights | moved
    )
    FORMAT.write(whole, tmp_path, ExportOptions())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [
        "model.embed_tokens", "model.norm",
        *(f"model.layers.{i}.post_attention_layernorm" for i in range(2)),
    ]  # fmt: skip
    written = FORMAT.read_back(tmp_path, whole)
    for path, index in (("embedding.table", ()), ("layers.mlp_norm.scale", (1,))):
        np.testing.assert_array_equal(written.read(path, index), moved[path][index])
    alone = dataclasses.replace(whole, adapters={})
    with pytest.raises(UserError, match="has no adapters: use --format=hf"):
        FORMAT.write(alone, tmp_path, ExportOptions())


class NamedTensors:
    """A file whose names begin otherwise than its family's do."""

    def __init__(self, beginning):
        self._beginning = beginning

    def layout(self, family):
        return family.hf_layout([f"{self._beginning}embed_tokens.weight"])


@pytest.mark.parametrize(
    "beginning, own",
    [
        ("model.", "model."),
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "model.language_model."),
    ],
)
def test_a_text_part_has_the_names_of_its_multimodal_model(
    exported, tmp_path, beginning, own
):
    """As transformers 5 has them in memory, whatever the files of the base say."""
    model = model_of("gemma3")
    factors, scales = adapters_of(model)
    base = dataclasses.replace(exported.base, tensors=NamedTensors(beginning))
    adapters = {
        path: ExportedAdapter(jax.device_put(x), rank, scales[path] * rank)
        for path, x in factors.items()
        for rank in [x["a"].shape[-1]]
    }
    part = dataclasses.replace(exported, model=model, base=base, adapters=adapters)
    FORMAT.write(part, tmp_path, ExportOptions())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = {*config["target_modules"]} - {"lm_head"}
    assert f"{own}layers.0.mlp.up_proj" in names
    assert all(name.startswith(own) for name in names)
    opened = AdapterFolder(str(tmp_path), model.architecture, model.specs)
    assert opened.ranks.keys() == factors.keys()
