"""Adapter folders of PEFT, in both directions, for every family.

`golden/adapters.py` recorded adapters that PEFT made, and what PEFT computes from ours.
"""

import json
import re

import numpy as np
import pytest
from peft_exports import (
    ADAPTERS,
    LORA,
    adapters_of,
    export_of,
    model_of,
    write_adapter,
)
from seeded_factors import make_factors, read_export

from research.config.knob_groups import LoRAConfig
from research.formats.peft.adapter_folder import AdapterFolder
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import used
from research.weights.adapters.adapter_kind import Settings
from research.weights.adapters.lora import KIND, merge
from research.weights.contraction import materialize

START = "base_model.model."
NAMES = sorted(path.name for path in ADAPTERS.iterdir())


@pytest.fixture(scope="module")
def exported():
    """Models, adapters and exports by name, each made once."""
    made = {}

    def make(name):
        if name not in made:
            model = model_of(name)
            factors, scales = adapters_of(model)
            made[name] = model, factors, scales, *export_of(model, factors, scales)
        return made[name]

    return make


def update(factors, scale, spec):
    """The sum that the adapter of one parameter adds to it, in float64."""
    a, b = (np.asarray(factors[name], np.float64) for name in "ab")
    stack, rank = spec.shape[: spec.stacked], a.shape[-1]
    product = a.reshape(*stack, -1, rank) @ b.reshape(*stack, rank, -1)
    return scale * product.reshape(spec.shape)


def place_of(name):
    """Where PEFT writes the factors of a tensor: both parameters of experts, nested."""
    name = re.sub(r"experts\.gate_up_proj$", "experts.base_layer", name)
    name = re.sub(r"experts\.down_proj$", "experts", name)
    return name.removesuffix(".weight").replace("embed_out", "lm_head")


def updates_of_files(model, factors, scales):
    """By place of PEFT's tensors, what is added to a weight, `[out, in]`.

    The experts of GPT-OSS lie in one tensor, `[E, out, in]`.
    """
    specs, found = model.specs, {}
    added = {path: update(factors[path], scales[path], specs[path]) for path in factors}
    for stored in used(family_of(model.architecture).hf_tensors, specs):
        if specs[stored.paths[0]].n_in:
            for name, index in stored.names(specs):
                none = [np.zeros(specs[path].shape) for path in stored.paths]
                parts = [
                    added.get(path, zero)[index]
                    for path, zero in zip(stored.paths, none, strict=True)
                ]
                value = stored.pack(parts, specs)
                found[place_of(name)] = (
                    value if stored.transposed else value.swapaxes(-1, -2)
                )
    return found


def product(pair, experts):
    """The sum that PEFT's `get_delta_weight` makes of two tensors, without a scale."""
    a, b = np.float64(pair["A"]), np.float64(pair["B"])
    if experts == 1:
        return b @ a
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts)
    return np.einsum("o r e, e r i -> e o i", b, a)


@pytest.mark.parametrize("name", NAMES)
def test_a_loader_that_knows_no_patterns_computes_the_same(exported, name):
    """As vLLM: one scale, room for rank r, and two tensors for each module."""
    model, factors, scales, tensors, config = exported(name)
    assert {"peft_type", "task_type", "r", "lora_alpha", "target_modules"} <= {*config}
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int)
    scale = config["lora_alpha"] / config["r"]
    expected = updates_of_files(model, factors, scales)
    if model.architecture.tied_head:
        table = "transformer.wte" if name == "gpt2" else "model.embed_tokens"
        expected["lm_head"] = expected[table].T
        assert config["ensure_weight_tying"]
    found = {}
    for key, value in tensors.items():
        module, _, end = key.removeprefix(START).partition(".lora_")
        assert key.startswith(START)
        assert end in ("A.weight", "B.weight", "embedding_A", "embedding_B")
        is_table = expected[module].shape[-1] == model.architecture.vocab
        assert end.startswith("embedding") == (is_table or module.endswith("wpe"))
        found.setdefault(module, {})[end[-1] if end[-1] in "AB" else end[0]] = value
    targets = [*config["target_modules"], *config.get("target_parameters", ())]
    targets = {place_of(target): target for target in targets}
    assert {*found} == {*expected} == {*targets}
    for module, pair in found.items():
        experts = len(expected[module]) if expected[module].ndim == 3 else 1
        rank = pair["A"].shape[0] // experts
        assert pair["B"].shape[1] // experts == rank <= config["r"]
        update = scale * product(pair, experts)
        np.testing.assert_array_equal(update, expected[module], err_msg=module)
        # Newer versions of PEFT match a whole name, too, and older ones only its end.
        for start in (r"(.*\.)?", r".*\."):
            number = pattern_of(start, targets[module], config)
            assert number("rank_pattern", config["r"]) == rank
            assert number("alpha_pattern", config["lora_alpha"]) == scale * rank


def pattern_of(start, module, config):
    """The number of the first pattern that matches a module from `start` on."""

    def number(name, default):
        pattern = config.get(name, {})
        keys = [key for key in pattern if re.match(f"{start}({key})$", module)]
        return pattern.get(keys[0] if keys else module, default)

    return number


@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_read_back_exactly(exported, tmp_path, name):
    model, factors, scales, tensors, config = exported(name)
    folder = write_adapter(tmp_path / "adapter", tensors, config)
    adapter = AdapterFolder(folder, model.architecture, model.specs)
    assert [*adapter.ranks] == [path for path in model.specs if path in factors]
    found = adapter.lora_config(LoRAConfig(dropout=0.1))
    assert found.dropout == 0.1
    own = KIND.specs(model.specs, LORA)
    assert KIND.specs(model.specs, found) == {path: own[path] for path in adapter.ranks}
    assert KIND.settings(adapter.ranks, found).scales == adapter.scales
    for path, own in factors.items():
        read, spec = adapter.factors(path), model.specs[path]
        np.testing.assert_array_equal(read["a"], own["a"], err_msg=path)
        expected = update(own, scales[path], spec)
        np.testing.assert_array_equal(
            update(read, adapter.scales[path], spec), expected, err_msg=path
        )


@pytest.mark.parametrize("name", NAMES)
def test_peft_has_read_this_very_export(exported, name):
    """The recorded one, from which `make golden` lets PEFT compute its logits."""
    _, _, _, tensors, config = exported(name)
    known, recorded = read_export(ADAPTERS / name)
    assert known == config
    assert [*recorded] == [*tensors]
    for key, value in tensors.items():
        np.testing.assert_array_equal(value, recorded[key], err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(golden, exported, tmp_path, name):
    """From our adapters in PEFT, and from PEFT's adapters here."""
    it, expected = golden(name), np.load(ADAPTERS / name / "expected.npz")
    _, factors, scales, *_ = exported(name)
    streams = dict.fromkeys(factors, 0)
    adapted = KIND.attach(it.params, factors, Settings(scales, streams, 0.0))
    ours, _ = it.logits({path: materialize(leaf) for path, leaf in adapted.items()})
    assert np.abs(ours - expected["ours"]).max() < 1e-3
    folder = write_adapter(tmp_path / "peft", *made_by_peft(name))
    adapter = AdapterFolder(folder, it.architecture, it.model.specs)
    read = {path: adapter.factors(path) for path in adapter.ranks}
    config = adapter.lora_config(LoRAConfig())
    theirs, _ = it.logits(merge(it.params, read, config))
    assert np.abs(theirs - expected["peft"]).max() < 1e-3
    plain, _ = it.logits(it.params)
    assert min(np.abs(plain - x).max() for x in (ours, theirs)) > 0.1


def made_by_peft(name):
    """The tensors and config of the recorded adapter that PEFT made."""
    recorded = json.loads((ADAPTERS / name / "peft.json").read_text())
    tensors = make_factors(recorded["shapes"], recorded["seed"])
    if recorded["config"]["ensure_weight_tying"]:
        (table,) = [key[:-1] for key in tensors if key.endswith("embedding_A")
                    and "wpe" not in key]  # fmt: skip
        for key in [key for key in tensors if ".lm_head." in key]:
            other = "B" if key.endswith("lora_A.weight") else "A"
            tensors[key] = tensors[table + other].T
    return tensors, recorded["config"]
