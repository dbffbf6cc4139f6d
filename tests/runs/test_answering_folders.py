"""Adapter folders of PEFT answer as runs do: the same weights, prompts and refusals."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from doors import run_door
from peft_exports import write_adapter, write_run
from safetensors.numpy import load_file, save_file
from small_run import one_device

from research.core.errors import UserError
from research.evaluate.__main__ import main as evaluate
from research.evaluate.measuring.evaluated_models import find_models, require_held_out
from research.export.exported_sources import open_source
from research.export.write_model import write_model
from research.formats.base_model import open_base
from research.formats.load_parameters import load_base
from research.formats.peft import find_adapter
from research.formats.peft.adapter_folder import AdapterFolder
from research.generate.__main__ import GenerateFlags, _check
from research.generate.asked_model import open_asked
from research.runs.answering.found_adapters import find_adapters, open_folder
from research.runs.answering.open_for_answering import open_for_answering
from research.runs.answering.run_addresses import RunAddress, run_addresses
from research.runs.reopen import reopen
from research.serve import model_reader
from research.tokenize.conversation import Turn
from research.weights.contraction import materialize
from research.weights.representations.low_rank import LowRank

TURNS = [Turn("user", "Add 3 to 4")]


@pytest.fixture(scope="module")
def run(place, unbroken):
    """A finished run of adapters of rank 4, open."""
    assert unbroken.code == 0, unbroken.err
    return reopen(place.run_dir("unbroken"), one_device())


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The export of that run in the format of PEFT."""
    return write_run(run, tmp_path_factory.mktemp("adapters") / "tuned")


@pytest.fixture(scope="module")
def opened(folder):
    return open_for_answering([str(folder)], mesh=one_device())


def changed(folder, target, **fields):
    """A copy with other fields in its config; None removes one."""
    shutil.copytree(folder, target)
    file = target / "adapter_config.json"
    config = json.loads(file.read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    file.write_text(json.dumps(kept))
    return str(target)


def row_of(leaves):
    return {
        path: [np.asarray(x) for x in jax.tree.leaves(v)] for path, v in leaves.items()
    }


def test_a_folder_is_served_as_its_run_is(run, folder, opened):
    (address,) = opened.runs
    task = json.loads(json.dumps(model_reader.reading("adapter", address)))
    reader = model_reader.ModelReader(opened, None)
    reader.check(task)
    identity, served = reader.perform(task)
    assert (served.name, served.parent, served.step) == ("tuned", "base", 0)
    assert served.is_chat and not served.has_changed()
    assert served.prompts.encode_prompt(TURNS) == run.prompts.encode_prompt(TURNS)
    (of_run,) = run_addresses([str(run.folder.path)])
    theirs = row_of(opened.read(of_run)[1])
    ours = row_of(reader.row(identity))
    assert theirs.keys() == ours.keys()
    for path, leaves in theirs.items():
        for own, other in zip(ours[path], leaves, strict=True):
            np.testing.assert_array_equal(own, other, err_msg=path)
    assert any(x.any() for leaves in ours.values() for x in leaves)


def test_a_folder_is_asked_as_its_run_is(run, folder):
    """With its base beside it, which its config names."""
    asked = open_asked(str(folder), compare=True)
    assert asked.prompts.encode_prompt(TURNS) == run.prompts.encode_prompt(TURNS)
    assert [*asked.generators] == ["base", "tuned"]
    tuned = asked.generators["tuned"].params
    assert {p for p, x in tuned.items() if isinstance(x, LowRank)} == {*run.params}
    for path in run.params:
        for name in ("a", "b", "scale"):
            own, other = (getattr(x[path], name) for x in (tuned, run.weights))
            np.testing.assert_array_equal(own, other, err_msg=f"{path} {name}")


def test_a_folder_is_exported_as_its_run_is(run, folder, tmp_path):
    """Merged, with a card and a proof."""
    out = tmp_path / "out"
    write_model(str(folder), "latest", out, "", False)
    merged = load_base(open_base(str(out)), run.model, run.mesh, np.float32, 0)
    for path, leaf in run.weights.items():
        own = materialize(leaf)
        np.testing.assert_allclose(merged[path], own, atol=1e-6, err_msg=path)
    card, parity = (out / "README.md").read_text(), out / "parity.json"
    assert "- adapter: tuned" in card and "LoRA adapters of rank 4" in card
    assert json.loads(parity.read_text())["rows"] == "a fixed text"
    origin = json.loads((out / "exported_from.json").read_text())
    assert origin["adapter"] == origin["identity"]["adapter"] and not origin["run"]
    # The same once more, and another adapter in its place.
    write_model(str(folder), "latest", out, "", False)
    other = changed(folder, tmp_path / "other", lora_alpha=3)
    with pytest.raises(UserError, match=r"holds adapter .* and adapter .* would repl"):
        write_model(other, "latest", out, "", False)


@pytest.mark.parametrize(
    "step, out, model, said",
    [
        ("3", "x", "", "which has no steps: drop --step"),
        ("latest", None, "", "name the folder to write with --out=FOLDER"),
        ("latest", "x", "/gone", "base model '/gone' does not exist"),
    ],
)
def test_an_export_of_a_folder_says_what_it_lacks(
    folder, tmp_path, step, out, model, said
):
    out = out and tmp_path / out
    with pytest.raises(UserError, match=said):
        write_model(str(folder), step, out, "", False, model=model)
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_evaluated_as_its_run_is(run, folder, tmp_path):
    """On rows of a file, beside the run; the results are where the command runs."""
    rows = [
        {"instruction": f"Add {x} to 4", "response": f"The sum is {x + 4}"}
        for x in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--run={folder}", f"--run={run.folder.path}", f"--data={file}")
    more = ("--metrics=chrf", "--max_new_tokens=4", "--slots=2")
    before = {*folder.iterdir()}
    done = run_door(evaluate, tmp_path, "evaluate", *flags, *more)
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "evaluations").glob("*-step-0/evaluation.json")
    assert {*folder.iterdir()} == before
    values = json.loads(found.read_text())
    base, ours, theirs = (values["models"][x] for x in ("base", "tuned", "unbroken"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2) != base["loss"]
    assert ours["step"] == 0 and values["baseline"] == "base"
    assert "does not say what it was" in values["overlap"]["tuned"]["problem"]
    assert not values["overlap"]["unbroken"]["problem"]


def test_an_export_of_nothing_says_that_it_is_no_run(tmp_path):
    with pytest.raises(UserError, match="gone is not a run directory: it has no conf"):
        write_model(str(tmp_path / "gone"), "latest", tmp_path / "out", "", False)
    assert not [*tmp_path.iterdir()]


def test_a_base_is_named_for_adapters_alone(run, tmp_path):
    with pytest.raises(UserError, match="is none: drop --model, as a run knows its"):
        write_model(str(run.folder.path), "latest", None, "", False, model="x")
    with pytest.raises(UserError, match="--run names none: drop --model, as a run kno"):
        find_models([str(run.folder.path)], model="x")


def test_an_adapter_of_the_hub_is_asked_by_its_address(
    folder, tmp_path, monkeypatch, run
):
    """Every door takes it in the place of a run; a whole model is none."""
    kept = {"owner/tuned": folder, "owner/model": tmp_path}
    fetch = lambda address, *_: kept[address.name]  # noqa: E731
    monkeypatch.setattr(find_adapter, "fetch_files", fetch)
    name = "hub://owner/tuned"
    (address,) = run_addresses([name], with_folders=True)
    assert (address.name, address.folder, address.step) == ("tuned", folder, "")
    assert open_asked(name).name == name
    assert find_models([name]).models[1].run.identity == open_folder(name).identity
    source = open_source(name, "latest", tmp_path / "out", "")
    assert source.identity["base model"] == run.base.fingerprint
    with pytest.raises(UserError, match=r"is no adapter.*whole model is given as --mo"):
        open_source("hub://owner/model", "latest", tmp_path / "out", "")


def test_a_base_is_found_by_its_name_or_given(folder, tmp_path):
    named = {
        "none": ({"base_model_name_or_path": None}, "names no base model: give its"),
        "gone": ({"base_model_name_or_path": "/gone/model"}, "which is not here: give"),
    }
    for name, (fields, said) in named.items():
        other = changed(folder, tmp_path / name, **fields)
        with pytest.raises(UserError, match=f"{said}.* --model="):
            open_for_answering([other])
    model = json.loads((folder / "adapter_config.json").read_text())
    model = model["base_model_name_or_path"]
    found = open_for_answering([other], model=model, mesh=one_device())
    assert found.served_base.root == model
    hub = changed(folder, tmp_path / "hub", base_model_name_or_path="no/model-24")
    with pytest.raises(UserError, match="hub://no/model-24"):
        open_for_answering([hub])


def test_other_tokens_are_refused(folder, opened, tmp_path):
    changed(folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    rules = json.loads(file.read_text())
    vocabulary = rules["model"]["vocab"]
    first, second, *_ = [*vocabulary][40:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(rules))
    with pytest.raises(UserError, match=r"2 other tokens than .* \(such as "):
        opened.read(RunAddress("other", tmp_path / "other", ""))


def test_a_folder_has_no_steps_and_no_rows(folder):
    with pytest.raises(UserError, match="which has no steps: drop --step"):
        _check(GenerateFlags(run=str(folder), step="3"))
    _check(GenerateFlags(run=str(folder), model="model", compare=True))
    with pytest.raises(UserError, match="which has no steps: drop --step"):
        find_models([str(folder)], step="best")
    with pytest.raises(UserError, match="holds no rows out: name rows with --data="):
        require_held_out(find_models([str(folder)]))
    with pytest.raises(UserError, match="is no run directory"):
        run_addresses([f"{folder}@3"], with_folders=True)


def test_parameters_that_are_trained_whole_enter_no_bank(folder, opened, monkeypatch):
    """A bank has room for factors alone, and would drop them without a word."""
    read = AdapterFolder.lora_config

    def with_norms(self, lora):
        return dataclasses.replace(read(self, lora), full=("norm",))

    monkeypatch.setattr(AdapterFolder, "lora_config", with_norms)
    with pytest.raises(UserError, match=r"norm.* whole, trained beside its factors"):
        opened.read(RunAddress("tuned", folder, ""))


def test_an_adapter_is_no_base_model(folder):
    with pytest.raises(UserError, match="and no base model: give it as --run to"):
        open_for_answering(model=str(folder))


@pytest.mark.parametrize("known", [True, False])
def test_another_base_of_the_same_shape_is_warned_of(
    folder, opened, tmp_path, caplog, known
):
    """An export of ours says which files it was trained on."""
    changed(folder, tmp_path / "own")
    digest = opened.base.fingerprint if known else "f" * 64
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        tensors, tmp_path / "own" / "adapter_model.safetensors",
        {"format": "pt", "base_sha256": digest},
    )  # fmt: skip
    find_adapters(RunAddress("own", tmp_path / "own", ""), opened.base)
    assert ("sha256 ffffffffffff" in caplog.text) != known


def test_a_number_that_is_not_finite_answers_nobody(folder, opened, tmp_path):
    changed(folder, tmp_path / "nan")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name][0, 0] = np.nan
    config = json.loads((folder / "adapter_config.json").read_text())
    write_adapter(tmp_path / "nan", tensors, config)
    with pytest.raises(UserError, match=f"{name} holds a number that is not finite"):
        opened.read(RunAddress("nan", tmp_path / "nan", ""))
