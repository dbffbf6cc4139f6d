"""An adapter folder is written and read a module and a layer at a time."""

import collections
import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported_models import with_adapters
from peft_exports import adapters_of, export_of, model_of, write_adapter

from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError
from research.formats.export_format import ExportOptions
from research.formats.fused_factors import update_of
from research.formats.peft.adapter_folder import AdapterFolder
from research.formats.peft.adapter_tensors import AdapterTensors
from research.formats.peft.peft_export import plan_adapter
from research.formats.peft.peft_format import FORMAT
from research.models.transformer import Model
from research.weights.adapters.lora import KIND


@pytest.mark.parametrize(("name", "layers"), [("qwen3_moe", 4), ("phi3", 48)])
def test_a_writer_holds_the_tensors_of_one_module(name, layers):
    """Factors are made when their turn comes, and never all of them."""
    shape = dataclasses.replace(model_of(name).architecture, layers=layers)
    model = Model(shape)
    paths = [x for x in model.specs if ".mlp." in x and x.endswith("kernel")]
    # A high rank, so that names and the patterns of other threads weigh little.
    specs = {path: KIND.matrix_specs(model.specs[path], 1024) for path in paths}
    fetched = collections.Counter()

    def make(path, index):
        fetched[path, index] += 1
        own = specs[path].values()
        return tuple(np.ones(x.shape[len(index) :], np.float32) for x in own)

    scales = dict.fromkeys(paths, 2.0)
    tracemalloc.start()
    try:
        plan = plan_adapter(shape, model.specs, scales, make)
        tensors = plan.tensors()
        before = fetched.total()
        name, first = next(tensors)
        assert fetched.total() - before <= 6, "more than one module is made"
        total = sum(4 * np.prod(x) for x in plan.shapes.values())
        total -= first.nbytes + sum(value.nbytes for _, value in tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 0
    assert peak < sum(4 * np.prod(x) for x in plan.shapes.values()) / 4


@pytest.mark.parametrize("name", ["phi3", "mixtral", "gpt_oss", "gpt_neox"])
def test_a_walk_over_layers_reads_each_tensor_once(name, tmp_path, monkeypatch):
    """As the proof of an export walks: all matrices of a layer, then the next layer."""
    model = model_of(name)
    factors, scales = adapters_of(model)
    tensors, config = export_of(model, factors, scales)
    folder = write_adapter(tmp_path / "adapter", tensors, config)
    adapter = AdapterFolder(folder, model.architecture, model.specs)
    reads, stored = collections.Counter(), AdapterTensors.stored
    monkeypatch.setattr(
        AdapterTensors,
        "stored",
        lambda self, key: reads.update([key]) or stored(self, key),
    )
    found = {path: [] for path in factors}
    stacked = [path for path in factors if model.specs[path].stacked]
    for layer in range(model.architecture.layers):
        for path in stacked:
            found[path].append(adapter.layer(path, (layer,)))
    for path in factors.keys() - stacked:
        found[path] = [tuple(x[None] for x in adapter.layer(path))]
    head = [x for x in tensors if ".lm_head." in x and model.architecture.tied_head]
    assert reads == collections.Counter(tensors.keys() - head)
    for path, own in factors.items():
        whole = adapter.factors(path)
        for i, name in enumerate("ab"):
            layers = np.stack([np.squeeze(pair[i]) for pair in found[path]])
            np.testing.assert_array_equal(np.squeeze(layers), np.squeeze(whole[name]))
            assert whole[name].shape == own[name].shape


@pytest.mark.parametrize("name", ["gpt_oss"])
def test_experts_are_read_back_as_they_were_written(name, tmp_path):
    model = model_of(name)
    config = LoRAConfig(rank=3, alpha=6.0, targets=("down.kernel",))
    base = {p: jnp.ones(spec.shape) for p, spec in model.specs.items() if "down" in p}
    exported = with_adapters(model, base, config)
    FORMAT.write(exported, tmp_path, ExportOptions())
    read = FORMAT.read_back(tmp_path, exported).read
    (path,) = exported.adapters
    a, b = (np.asarray(exported.adapters[path].factors[name][1]) for name in "ab")
    np.testing.assert_allclose(read(path, (1,)), 2 * a @ b, atol=1e-6)
    assert a.ndim == 3 and np.abs(a @ b).max() > 1e-3


def test_a_factor_is_made_in_its_sharding(tmp_path):
    model = model_of("gpt_oss")
    factors, scales = adapters_of(model)
    folder = write_adapter(tmp_path / "adapter", *export_of(model, factors, scales))
    adapter = AdapterFolder(folder, model.architecture, model.specs)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = {path: dict.fromkeys("ab", where) for path in factors}
    loaded = adapter.load(shardings)
    for path in adapter.ranks:
        whole = adapter.factors(path)
        for name, value in loaded[path].items():
            np.testing.assert_array_equal(np.asarray(value), whole[name])


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_peft_wraps_a_single_parameter_once(only, tmp_path):
    """So its tensors lie where those of the outer one of two would."""
    model = model_of("gpt_oss")
    factors, scales = adapters_of(model)
    own = ("gate", "up") if only == "gate_up_proj" else ("down",)
    chosen = {p: x for p, x in factors.items() if p.split(".")[-2] in own}
    scales = {path: scales[path] for path in chosen}
    tensors, config = export_of(model, chosen, scales)
    assert not [key for key in tensors if ".base_layer." in key]
    assert {x.rpartition(".")[2] for x in config["target_parameters"]} == {only}
    assert config["target_modules"] == []
    folder = write_adapter(tmp_path / "adapter", tensors, config)
    adapter = AdapterFolder(folder, model.architecture, model.specs)
    assert adapter.ranks.keys() == chosen.keys()
    for path, each in chosen.items():
        np.testing.assert_array_equal(adapter.factors(path)["a"], each["a"])


@pytest.mark.parametrize("width", ["square", "half", "wide"])
@pytest.mark.parametrize("version", ["0.18.1", "0.21.2", ""])
def test_experts_of_older_versions_of_peft_are_turned(width, version, tmp_path):
    """Shapes tell it; where all tensors are square, the version of PEFT does."""
    shape = model_of("qwen3_moe").architecture
    mlp = {"square": shape.embed, "half": shape.embed // 2, "wide": 24}[width]
    # The gates of experts half as wide as the model are square, and not their outputs.
    model = Model(dataclasses.replace(shape, mlp=mlp))
    place = "base_model.model.model.layers.0.mlp.experts"
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2,
        "target_parameters": ["experts.down_proj"],
    }  # fmt: skip
    count, rng = shape.experts.count, np.random.default_rng(1)
    ends, updates, tensors = {"down": (mlp, shape.embed)}, {}, {}
    places = {"down": f"{place}.lora_"}
    if width == "half":
        config["target_parameters"].append("experts.gate_up_proj")
        ends["gate"] = shape.embed, 2 * mlp
        places["gate"] = f"{place}.base_layer.lora_"
    for name, (inputs, outputs) in ends.items():
        a, b = (
            rng.normal(size=(2 * count, inputs)),
            rng.normal(size=(outputs, 2 * count)),
        )
        if version == "0.18.1":
            a, b = (
                rng.normal(size=(2 * count, outputs)),
                rng.normal(size=(inputs, 2 * count)),
            )
        pair = a.reshape(count, 2, -1), b.reshape(-1, 2, count)
        # As `get_delta_weight` of either version: the older one adds it as it is.
        product = np.einsum("ore,eri->eoi", pair[1], pair[0])
        updates[name] = product if version == "0.18.1" else product.swapaxes(1, 2)
        tensors[f"{places[name]}A.weight"] = np.float32(a)
        tensors[f"{places[name]}B.weight"] = np.float32(b)
    if version:
        config["peft_version"] = version
    folder = write_adapter(tmp_path / "adapter", tensors, config)

    def read():
        return AdapterFolder(folder, model.architecture, model.specs)

    if width == "square" and not version:
        with pytest.raises(UserError, match="set peft_version in adapter_config"):
            read()
        return
    adapter = read()
    for path in adapter.ranks:
        spec, name = model.specs[path], path.split(".")[-2]
        found = update_of(adapter.layer(path, (0,)), spec, adapter.scales[path])
        expected = updates["down" if name == "down" else "gate"]
        if name != "down":
            expected = np.split(expected, 2, 2)[name == "up"]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=path)


def test_factors_of_zeros_alone_are_no_adapter(tmp_path):
    """Which of the fused matrices they would belong to cannot be known."""
    model = model_of("phi3")
    tensors, config = export_of(model, *adapters_of(model))
    tensors = {k: 0 * x for k, x in tensors.items() if "qkv_proj" in k}
    folder = write_adapter(tmp_path / "adapter", tensors, config)
    with pytest.raises(UserError, match="holds zeros alone"):
        AdapterFolder(folder, model.architecture, model.specs)


def test_a_router_may_be_a_parameter_of_a_newer_model(tmp_path):
    """As PEFT saves Mixtral's: under the newer name, with patterns for the weight."""
    model, path = model_of("mixtral"), "layers.router.kernel"
    spec = model.specs[path]
    a, b = np.ones((3, spec.shape[1])), np.ones((spec.shape[2], 3))
    start = "base_model.model.model.layers.1.mlp.gate.lora_"
    tensors = {f"{start}A.weight": np.float32(a), f"{start}B.weight": np.float32(b)}
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 6,
        "target_parameters": ["mlp.gate.weight"],
        "rank_pattern": {r".*\.gate\.weight": 3},
    }  # fmt: skip
    folder = write_adapter(tmp_path / "adapter", tensors, config)
    adapter = AdapterFolder(folder, model.architecture, model.specs)
    assert (adapter.ranks, adapter.scales) == ({path: 3}, {path: 2.0})
    assert adapter.layer(path, (1,))[0].all() and not adapter.layer(path, (0,))[0].any()


@pytest.mark.parametrize("kind", ["spellings", "marks", "experts"])
def test_two_names_of_one_tensor_are_refused(kind, tmp_path):
    model = model_of({"spellings": "gemma3"}.get(kind, "mixtral"))
    factors, scales = adapters_of(model)
    tensors, config = export_of(model, factors, scales)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if kind == "spellings":
        other = ".model.model.", ".model.language_model.model."
        tensors |= {k.replace(*other): x for k, x in tensors.items() if "q_proj" in k}
    elif kind == "marks":
        tensors[first.replace(".weight", ".default.weight")] = tensors[first]
    else:
        start = "base_model.model.model.layers.0.mlp.experts.lora_"
        module = model.specs["layers.mlp.down.kernel"]
        _, experts, inputs, outputs = module.shape
        tensors[f"{start}A.weight"] = np.ones((experts * 4, inputs), np.float32)
        tensors[f"{start}B.weight"] = np.ones((outputs, experts * 4), np.float32)
        config["rank_pattern"] = {**config.get("rank_pattern", {}), ".*down_proj": 4}
    folder = write_adapter(tmp_path / "adapter", tensors, config)
    with pytest.raises(UserError, match="are two names of one tensor: remove"):
        AdapterFolder(folder, model.architecture, model.specs)


@pytest.mark.parametrize("start", ["", "model."])
@pytest.mark.parametrize("end", ["lora_A.weight", "weight"])
def test_a_part_that_is_not_computed_is_no_other_base(start, end, tmp_path):
    model = model_of("gemma3")
    tensors, config = export_of(model, *adapters_of(model))
    place = f"{start}vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    for own in (end, end.replace("_A", "_B")):
        tensors[f"base_model.model.{place}.{own}"] = np.ones((4, 4), np.float32)
    folder = write_adapter(tmp_path / "adapter", tensors, config)
    with pytest.raises(UserError, match="not computed here") as error:
        AdapterFolder(folder, model.architecture, model.specs)
    assert place in str(error.value) and "another base" not in str(error.value)
