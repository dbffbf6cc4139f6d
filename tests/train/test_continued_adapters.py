"""A run that continues an adapter folder of PEFT: its config, its start, its resume."""

import dataclasses
import json
from shutil import copytree

import jax
import numpy as np
import pytest
from helpers import close
from peft_exports import adapters_of, export_of, write_adapter
from safetensors.numpy import load_file, save_file
from small_run import make_small_place, one_device, small_config
from tiny_model import CONFIG

from research.config.knob_groups import LoRAConfig
from research.config.saved_config import to_json
from research.core.errors import UserError
from research.core.local_paths import ADAPTER_FILE
from research.export.write_model import write_model
from research.formats.peft import find_adapter
from research.formats.peft.adapter_config import TENSORS
from research.models.families.family_registry import from_hf_config
from research.models.transformer import Model
from research.runs.answering.open_for_answering import open_for_answering
from research.runs.lineage.adapter_start import with_adapter
from research.runs.lineage.hub_pins import pinned, resolve_addresses
from research.runs.reopen import reopen
from research.runs.run_directory import RunDir
from research.studio.jobs.job_commands import branching
from research.tasks import task_registry
from research.train import start_to_report
from research.train.step.definition_from_config import load_start, make_step_definition
from research.weights.adapters.lora import KIND
from research.weights.contraction import materialize
from research.weights.representations.adapter_bank import AdapterBank


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A place with a model, rows and an adapter to the model; factors and scales."""
    folder = tmp_path_factory.mktemp("continued")
    make_small_place(folder)
    model = Model(from_hf_config(CONFIG))
    factors, scales = adapters_of(model)
    write_adapter(folder / "adapter", *export_of(model, factors, scales))
    return folder, factors, scales


def config_of(folder, **lora):
    lora = LoRAConfig(**{"init_from": str(folder / "adapter"), **lora})
    return small_config(folder, "run", 2, lora=lora)


def test_the_adapter_gives_targets_ranks_and_scales(adapter):
    folder, factors, scales = adapter
    found = with_adapter(config_of(folder, dropout=0.1)).lora
    model = Model(from_hf_config(CONFIG))
    specs = KIND.specs(model.specs, found)
    assert {path: x["a"].shape for path, x in specs.items()} == {
        path: x["a"].shape for path, x in factors.items()
    }
    ranks = {path: KIND.rank(x) for path, x in specs.items()}
    # Its files have one scale, which most of ours had.
    assert KIND.settings(ranks, found).scales == dict.fromkeys(scales, 2.0)
    assert found.dropout == 0.1 and found.init_from == str(folder / "adapter")


def test_a_run_without_one_stays_as_it_is(adapter):
    config = config_of(adapter[0], init_from="", rank=3)
    assert with_adapter(config) is config
    full = dataclasses.replace(config_of(adapter[0]), trainable="full")
    assert with_adapter(full) is full


@pytest.mark.parametrize("asked", [{"rank": 64}, {"alpha": 1.0}, {"targets": ("mlp",)}])
def test_numbers_that_the_adapter_does_not_have_are_refused(adapter, asked):
    (name,) = asked
    with pytest.raises(UserError, match=rf"lora\.{name} is .*, and the adapter"):
        with_adapter(config_of(adapter[0], **asked))


def test_a_run_keeps_the_numbers_that_it_began_with(adapter, tmp_path):
    """Its adapter may be gone, as its factors are in its checkpoints."""
    config = config_of(adapter[0])
    begun = with_adapter(config)
    gone = dataclasses.replace(begun.lora, init_from=str(tmp_path / "gone"))
    (tmp_path / "run").mkdir()
    old = dataclasses.replace(begun, lora=gone)
    (tmp_path / "run" / "config.json").write_text(to_json(old))
    folder = RunDir(tmp_path / "run")
    asked = LoRAConfig(init_from=gone.init_from)
    again = with_adapter(dataclasses.replace(config, lora=asked), folder)
    assert again.lora == gone
    with pytest.raises(UserError, match="does not exist"):
        with_adapter(dataclasses.replace(config, lora=asked))
    # A branch lies over the weights with this adapter, and does not add it again.
    flags = branching(folder.path, 1, tmp_path / "next")
    assert "--config.lora.init_from=" in flags


def test_training_starts_at_the_adapter(adapter):
    folder, factors, scales = adapter
    config = with_adapter(config_of(folder))
    base = task_registry.open_start(config)
    mesh = one_device()
    objective = task_registry.make_objective(config, mesh)
    definition = make_step_definition(config, base, mesh, objective)
    params, frozen = load_start(definition, base, continued=config.lora)
    own = KIND.pad(factors, definition.trainable.specs)
    for path, leaf in definition.trainable.forward(params, frozen, None).items():
        if path in params:
            update = np.asarray(leaf.update())
            pair = KIND.attach_matrix(
                frozen[path], own[path], np.full(leaf.scale.shape, scales[path]), None,
                None,
            )  # fmt: skip
            np.testing.assert_allclose(update, pair.update(), rtol=1e-6)
    changed = dataclasses.replace(config.lora, alpha=7.0)
    with pytest.raises(UserError, match="other targets, ranks or alphas"):
        load_start(definition, base, frozen, changed)
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == "float32", params))


@pytest.mark.parametrize("said", ["sha256", "name"])
@pytest.mark.parametrize("is_own", [True, False])
def test_an_adapter_of_another_base_of_the_same_shape_is_warned_of(
    adapter, tmp_path, caplog, said, is_own
):
    config = with_adapter(config_of(adapter[0]))
    base = task_registry.open_start(config)
    own = copytree(adapter[0] / "adapter", tmp_path / "own")
    if said == "sha256":
        digest = base.fingerprint if is_own else "f" * 64
        tensors = load_file(own / TENSORS)
        save_file(tensors, own / TENSORS, {"format": "pt", "base_sha256": digest})
    else:
        base = dataclasses.replace(base, name="hub://owner/name@v1")
        fields = json.loads((own / ADAPTER_FILE).read_text())
        fields["base_model_name_or_path"] = "owner/name" if is_own else "owner/other"
        (own / ADAPTER_FILE).write_text(json.dumps(fields))
    mesh, lora = one_device(), dataclasses.replace(config.lora, init_from=str(own))
    objective = task_registry.make_objective(config, mesh)
    definition = make_step_definition(config, base, mesh, objective)
    load_start(definition, base, continued=lora)
    assert ("was trained on another base model" in caplog.text) != is_own


def test_an_adapter_of_the_hub_keeps_its_commit(adapter, tmp_path, monkeypatch):
    config = config_of(adapter[0], init_from="hub://owner/name")
    asked = []

    def fetch(address, timeout, patterns, lacking):
        asked.append((str(address), timeout, patterns[:2]))
        assert lacking(tmp_path) and not lacking(adapter[0] / "adapter")
        return adapter[0] / "adapter"

    monkeypatch.setattr(find_adapter, "fetch_files", fetch)
    found = with_adapter(config)
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert asked == [("hub://owner/name", config.data.hub_timeout, files)]
    assert found.lora == dataclasses.replace(
        with_adapter(config_of(adapter[0])).lora, init_from="hub://owner/name"
    )
    pins = {"hub://owner/name": f"hub://owner/name@{'0' * 40}"}
    assert resolve_addresses(found, pins, asking=False) == pins
    at_commit = pinned(found, pins)
    assert at_commit.lora.init_from == pins["hub://owner/name"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(at_commit))
    (tmp_path / "run" / "hub_revisions.json").write_text(json.dumps(pins))
    monkeypatch.setattr(find_adapter, "fetch_files", None)
    assert with_adapter(config, RunDir(tmp_path / "run")).lora == found.lora


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_a_run_of_each_kind_is_exported_and_continued(kind, adapter):
    """From the first step over a mesh of eight to other tools' files and back."""
    lora = LoRAConfig(kind=kind, rank=2, targets=("attention", "mlp.up"), rslora=True)
    config = small_config(adapter[0], kind, 4, lora=lora)
    assert start_to_report.train([config]) == 0
    run = reopen(config.run_dir)
    merged = {path: materialize(leaf) for path, leaf in run.weights.items()}
    out = adapter[0] / f"{kind}-peft"
    write_model(config.run_dir, "latest", out, "float32", False, ["peft"])
    asked = dataclasses.replace(config_of(adapter[0]), run_dir=str(adapter[0] / "next"))
    asked = dataclasses.replace(asked, lora=LoRAConfig(init_from=str(out)))
    asked = with_adapter(asked)
    assert asked.lora.kind == {"dora": "dora", "pissa": "lora"}[kind]
    mesh, base = one_device(), task_registry.open_start(asked)
    objective = task_registry.make_objective(asked, mesh)
    definition = make_step_definition(asked, base, mesh, objective)
    params, frozen = load_start(definition, base, continued=asked.lora)
    found = definition.trainable.forward(params, frozen, None)
    close({path: materialize(leaf) for path, leaf in found.items()}, merged)
    if kind == "dora":
        with pytest.raises(UserError, match="no adapters of kind 'dora'"):
            write_model(config.run_dir, "latest", None, "", False, ["gguf-adapter"])
        with pytest.raises(UserError, match="base model itself, and one base"):
            open_for_answering([config.run_dir], model=asked.model.init_from, mesh=mesh)
    served = open_for_answering([config.run_dir], mesh=mesh).params
    shared = [leaf for leaf in served.values() if isinstance(leaf, AdapterBank)]
    assert bool(shared) == (kind == "pissa") and {x.rank for x in shared} <= {4}
