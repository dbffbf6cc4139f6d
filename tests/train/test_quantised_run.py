"""A LoRA run over NF4 and other codes: its start, resume, meshes and exports."""

import dataclasses
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, mesh_sizes
from small_run import (
    as_killed,
    make_small_place,
    one_device,
    small_config,
    small_hidden,
)
from step_definitions import OneLogitStep

from research.config.run_config import Config, LoRAConfig, MeshConfig, ModelConfig
from research.core.errors import UserError
from research.export.exported_sources import open_source
from research.export.write_model import write_model
from research.formats.base_model import open_base
from research.formats.load_parameters import load_base
from research.models.presets import PRESETS
from research.parallel import mesh as meshes
from research.plan.abstract_step import make_abstract_step
from research.runs import reopen as reopened
from research.runs.answering.found_adapters import open_folder
from research.runs.answering.open_for_answering import open_for_answering
from research.runs.display_files import read_findings
from research.runs.metrics_file import read_metrics
from research.runs.reopen import reopen
from research.train import start_to_report
from research.weights.adapters.adapter_registry import find_kind
from research.weights.contraction import contract, materialize
from research.weights.parameter_spec import Spec
from research.weights.quantized.block_codes import BlockMatrix
from research.weights.quantized.int8_weights import Int8Matrix, as_int8

STEPS, KILLED = 4, 2
MATRIX = "layers.attention.output.kernel"
PATHS = ("down_proj=int8", "query=none")
# A matrix in NF4 and each of those.
TARGETS = ("attention.output", "attention.query", "mlp.down")
FORM = f"nf4 ({', '.join(PATHS)})"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    make_small_place(folder)
    return folder


def config_for(small, name, quantize="nf4", kind="lora", **changes):
    lora = LoRAConfig(kind=kind, rank=2, targets=TARGETS, full=("norms",))
    model = {"quantize": quantize, "quantize_paths": PATHS if quantize == "nf4" else ()}
    config = small_config(small, name, STEPS, model, lora=lora)
    return dataclasses.replace(config, **changes)


def train(small, name, *arguments, **changes):
    config = config_for(small, name, *arguments, **changes)
    assert start_to_report.train([config]) == 0
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def trained(small):
    return train(small, "run", export=False)


def losses(folder):
    return [x["loss"] for x in read_metrics(folder) if x["kind"] == "train"]


def test_products_of_bytes_are_for_training_alone():
    spec = Spec((12, 1), ("embed", "mlp"))
    codes = as_int8(jnp.linspace(0.0, 1.0, 12)[:, None], spec)
    # Beside the first input, whose weight is 0, all others round to 0.
    x = jnp.full((1, 12), 0.03).at[0, 0].set(10.0)
    step = OneLogitStep(
        lambda params, frozen, key: {"w": codes},
        lambda weights, ids: jnp.broadcast_to(contract(x, weights["w"]), ids.shape),
        int8_products=True,
    )
    logit = (np.float64(x) @ np.float64(materialize(codes))).item()
    assert step.loss(0, 0) == pytest.approx(np.log(2.0), abs=1e-6)
    # The target is the logit, and the other one is 0.
    assert step.held_out() == pytest.approx(np.log1p(np.exp(-logit)), abs=1e-6)
    assert logit > 0.1


def test_a_model_with_experts_multiplies_no_bytes():
    config = Config(
        model=ModelConfig(init_from="planned", quantize="int8", int8_products=True)
    )
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match=r"int8_products=True: this model has experts"):
        make_abstract_step(config, PRESETS["mixtral-6m"], mesh)


@pytest.mark.soak
def test_products_of_bytes_train_on_every_mesh_and_in_a_pack_as_alone(small):
    def config(name, **changes):
        made = config_for(small, name, "int8", export=False, **changes)
        model = dataclasses.replace(made.model, int8_products=True)
        lora = dataclasses.replace(made.lora, full=())
        return dataclasses.replace(made, model=model, lora=lora)

    sizes = mesh_sizes(fsdp=4, tensor=2)
    alone, spread = config("bytes"), config("bytes-spread", mesh=sizes)
    packs = [config("bytes-0"), config("bytes-1", seed=1)]
    for configs in ([alone], [spread], packs):
        assert start_to_report.train(configs) == 0
    expected = losses(Path(alone.run_dir))
    assert expected[-1] < expected[0]
    for found in (spread, packs[0]):
        # A sum in another order may move an input across the border of two steps.
        np.testing.assert_allclose(losses(Path(found.run_dir)), expected, rtol=2e-3)


def test_the_doctor_proves_the_start_and_the_loss_falls(trained):
    found = {finding.name: finding for finding in read_findings(trained)}
    assert found["lora at step 0"].numbers["differing"] == 0
    numbers = found["parameters"].numbers
    forms = {x: n for x, n in numbers.items() if x.startswith("frozen_bytes/")}
    assert sum(forms.values()) == numbers["frozen_bytes"]
    assert {"frozen_bytes/nf4", "frozen_bytes/int8"} < forms.keys()
    assert "in int8, " in found["parameters"].text
    assert losses(trained)[-1] < losses(trained)[0]


def test_a_killed_run_resumes_bit_for_bit_and_over_no_other_base(small, trained):
    killed = as_killed(trained, KILLED, small / "killed")
    with pytest.raises(UserError, match=r"model\.quantize: 'nf4' -> 'int8'"):
        train(small, "killed", "int8", export=False)
    with pytest.raises(UserError, match=r"model\.quantize_paths: .*query=none"):
        other = dataclasses.replace(reopen(trained).config.model, quantize_paths=())
        train(small, "killed", export=False, model=other)
    same = ("down_proj=none", "query = none", "down_proj=int8", "query=none")
    other = dataclasses.replace(reopen(trained).config.model, quantize_paths=same)
    train(small, "killed", export=False, model=other)
    history = json.loads((killed / "run.json").read_text())
    assert [start["first"] for start in history["starts"]] == [0, KILLED]
    pairs = map(jax.tree.leaves, (reopen(killed).params, reopen(trained).params))
    for found, expected in zip(*pairs, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_every_mesh_and_command_has_the_same_base(small, trained):
    run, alone = reopen(trained), reopen(trained, one_device())
    assert isinstance(run.frozen[MATRIX], BlockMatrix)
    assert isinstance(run.frozen["head.kernel"], Int8Matrix)
    assert isinstance(run.frozen["layers.mlp.down.kernel"], Int8Matrix)
    assert isinstance(run.frozen["layers.attention.query.kernel"], jax.Array)
    assert len(run.frozen[MATRIX].codes.sharding.device_set) > 1
    jax.tree.map(np.testing.assert_array_equal, run.frozen, alone.frozen)
    expected = small_hidden(alone.model, alone.weights)
    close(small_hidden(run.model, run.weights), expected, 1e-4)
    found = open_for_answering([str(trained)], mesh=one_device())
    jax.tree.map(np.testing.assert_array_equal, found.params, alone.weights)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["lora", "dora", "gaussian", "orthogonal", "pissa"])
def test_other_meshes_and_kinds_train_alike(small, kind):
    one = train(small, f"{kind}-a", kind=kind, export=False)
    sizes = mesh_sizes(data=1, fsdp=4, tensor=2)
    other = train(small, f"{kind}-b", kind=kind, export=False, mesh=sizes)
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-4)
    found = {finding.name: finding for finding in read_findings(one)}
    assert found[f"{kind} at step 0"].ok


def test_an_export_says_which_base_it_adds_to(small, trained, caplog):
    run = reopen(trained, one_device())
    kind, lora = find_kind("lora"), run.config.lora
    factors = run.trainable.adapters(run.params)
    whole = {path: run.params[path] for path in run.trainable.full}
    original = load_base(run.base, run.model, run.mesh, jnp.float32, 0)
    bases = {
        "dequantised": {p: materialize(leaf) for p, leaf in run.frozen.items()},
        "original": original,
    }
    for name, base in bases.items():
        out = small / name
        write_model(str(trained), "latest", out, "", False, base=name)
        written = load_base(open_base(str(out)), run.model, run.mesh, jnp.float32, 0)
        close(written, kind.merge(base, factors, lora) | whole)
        said = {
            "dequantised": f"what {FORM}",
            "original": "those of the base mode",
        }
        assert f"frozen weights: {said[name]}" in (out / "README.md").read_text()
    assert "codes over which the adapters were trained: the loss on" in caplog.text
    with pytest.raises(UserError, match="over the original base"):
        write_model(str(trained), "latest", small / "dequantised", "", False,
                    base="original")  # fmt: skip


def test_adapters_alone_are_written_over_the_base_that_tools_add_them_to(
    small, trained, monkeypatch
):
    out = small / "adapter"
    write_model(str(trained), "latest", out, "", False, ["peft"], base="original")
    card = (out / "README.md").read_text()
    found = re.search(
        r"not the (.*) codes.*loss on training rows is \d", card, re.DOTALL
    )
    assert found[1] == FORM
    folder = open_folder(str(out), str(small / "model"), is_exact=True)
    run = reopen(trained, one_device())
    original = load_base(run.base, run.model, run.mesh, jnp.float32, 0)
    factors = run.trainable.adapters(run.params)
    whole = {path: run.params[path] for path in run.trainable.full}
    merged = find_kind("lora").merge(original, factors, run.config.lora) | whole
    expected = small_hidden(run.model, merged)
    close(small_hidden(run.model, folder.load(one_device()).weights), expected, 1e-4)
    # Refused before the checkpoint is read.
    monkeypatch.delattr(reopened.FoundRun, "load")
    for format in ("peft", "gguf-adapter"):
        with pytest.raises(
            UserError, match=f"{format} writes .*nf4 .* codes.*format=hf"
        ):
            write_model(str(trained), "latest", out, "", False, ["hf", format])
    config = json.loads((trained / "config.json").read_text())
    for quantize, said in {"none": "original has no effect", "keep": ""}.items():
        copied = shutil.copytree(trained, small / f"as-{quantize}")
        config["model"] |= {"quantize": quantize, "quantize_paths": []}
        (copied / "config.json").write_text(json.dumps(config))
        base = "dequantised" if quantize == "keep" else "original"
        with pytest.raises(UserError, match=said) if said else nullcontext():
            open_source(str(copied), "latest", None, "", base, ["peft"])


def test_what_cannot_be_is_refused_before_anything_is_loaded(small):
    with pytest.raises(UserError, match=r"quantize is 'nf4'.*=none, or --config\.tra"):
        config_for(small, "full", trainable="full", lora=LoRAConfig())
