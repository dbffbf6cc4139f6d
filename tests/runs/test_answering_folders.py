"""Adapter folders of PEFT answer as runs do: the same weights, prompts and refusals."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from peft_exports import write_adapter, write_run
from safetensors.numpy import load_file, save_file
from small_run import one_device

from research.core.errors import UserError
from research.evaluate.measuring.evaluated_models import find_models
from research.formats.peft.adapter_folder import AdapterFolder
from research.generate.__main__ import GenerateFlags, _check
from research.generate.asked_model import SamplingFlags, open_adapter
from research.runs.answering.found_adapters import find_adapters
from research.runs.answering.open_for_answering import open_for_answering
from research.runs.answering.run_addresses import RunAddress, run_addresses
from research.runs.reopen import reopen
from research.serve import model_reader
from research.tokenize.conversation import Turn
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
    asked = open_adapter(str(folder), "", True, None, SamplingFlags())
    assert asked.prompts.encode_prompt(TURNS) == run.prompts.encode_prompt(TURNS)
    assert [*asked.generators] == ["base", "tuned"]
    tuned = asked.generators["tuned"].params
    assert {p for p, x in tuned.items() if isinstance(x, LowRank)} == {*run.params}
    for path in run.params:
        for name in ("a", "b", "scale"):
            own, other = (getattr(x[path], name) for x in (tuned, run.weights))
            np.testing.assert_array_equal(own, other, err_msg=f"{path} {name}")


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
    """The refusal of an evaluation has a command that makes a run of the folder."""
    with pytest.raises(UserError, match="which has no steps: drop --step"):
        _check(GenerateFlags(run=str(folder), step="3"))
    _check(GenerateFlags(run=str(folder), model="model", compare=True))
    with pytest.raises(UserError, match=r"adapter folder of PEFT.*lora\.init_from=/"):
        find_models([str(folder)])
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
