"""The sources of models: exports name their step, and runs build on runs."""

import json
import os
import re
import shutil

import pytest

from research.core.errors import UserError
from research.export.write_model import write_model
from research.runs.lineage import exported_run
from research.runs.lineage.exported_run import ModelOrigin, refuse_other_step
from research.runs.run_directory import RunDir


@pytest.fixture
def lora(place, unbroken):
    """A finished run of adapters."""
    assert unbroken.code == 0, unbroken.err
    return RunDir(place.run_dir("unbroken"))


@pytest.fixture(scope="module")
def exported(place, unbroken, tmp_path_factory):
    """An export of the newest step of the run of adapters."""
    assert unbroken.code == 0, unbroken.err
    out = tmp_path_factory.mktemp("exported") / "model"
    before = os.umask(0o022)
    write_model(str(place.run_dir("unbroken")), "latest", out, "float32", False)
    os.umask(before)
    return out


def content(folder):
    return {x.name: x.read_bytes() for x in folder.iterdir()}


# -- an export belongs to a step -------------------------------------------------------


def test_an_export_says_which_step_it_is(lora, exported):
    origin = json.loads((exported / "exported_from.json").read_text())
    assert origin["step"] == 16
    assert origin["run"] == lora.origin()["run"]
    assert origin["identity"] == lora.identity()
    assert origin["checkpoint"] == ModelOrigin.of(lora, 16, "float32").checkpoint != ""


def test_the_same_step_again_writes_nothing(lora, exported, caplog, monkeypatch):
    monkeypatch.setattr(exported_run.huggingface_export, "export", None)
    before = content(exported)
    with caplog.at_level("INFO"):
        write_model(str(lora.path), "latest", exported, "float32", False)
    assert "holds step 16" in caplog.text and "nothing is written" in caplog.text
    assert content(exported) == before


def test_another_step_is_refused_until_the_flag(lora, exported, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds step 16 .*, and step 15 .*--replace"):
        write_model(str(lora.path), "15", out, "float32", False)
    with pytest.raises(UserError, match=r"in float32, and step 16 .* in bfloat16"):
        write_model(str(lora.path), "16", out, "bfloat16", False)
    assert content(out) == content(exported)
    write_model(str(lora.path), "15", out, "float32", True)
    assert json.loads((out / "exported_from.json").read_text())["step"] == 15


def test_a_file_that_changed_is_not_the_same_export(lora, exported, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "README.md").write_text("my own words")
    with pytest.raises(UserError, match=r"README\.md of which has changed since"):
        write_model(str(lora.path), "latest", out, "float32", False)


def test_an_export_of_an_older_version_is_of_no_known_step(lora, exported, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "exported_from.json").unlink()
    with pytest.raises(UserError, match="does not say which step it is"):
        write_model(str(lora.path), "latest", out, "float32", False)


def test_a_folder_that_is_no_model_is_never_replaced(lora, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no exported model"):
        write_model(str(lora.path), "latest", tmp_path, "float32", True)
    assert [x.name for x in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_is_refused_before_it_trains_over_an_older_export(
    lora, exported, tmp_path
):
    folder = RunDir(shutil.copytree(lora.path, tmp_path / "run"))
    refuse_other_step(folder, 20, False)
    shutil.copytree(exported, folder.path / "model")
    refuse_other_step(folder, 16, False)
    with pytest.raises(UserError, match=r"--config\.replace_export=True"):
        refuse_other_step(folder, 20, False)
    refuse_other_step(folder, 20, True)


# -- what others read ------------------------------------------------------------------


def test_others_may_read_what_an_export_and_a_run_hold(lora, exported):
    mask = os.umask(0o022)
    os.umask(mask)
    files = [x for x in lora.path.rglob("*") if x.is_file()]
    assert len(files) > 20
    modes = {str(x): oct(x.stat().st_mode & 0o777) for x in files}
    expected = oct(0o666 & ~mask)
    assert not {x: mode for x, mode in modes.items() if mode != expected}
    assert {oct(x.stat().st_mode & 0o777) for x in exported.iterdir()} == {oct(0o644)}


def test_the_model_card_says_what_the_model_is(lora, exported, place):
    card = (exported / "README.md").read_text()
    losses = {x["step"]: x["loss"] for x in place.lines("unbroken", "eval")}
    for said in (
        "library_name: \"transformers\"", "- steps: 16 of 8 rows of 256 tokens",
        "LoRA adapters of rank 4", "base model: model", "embedded",
        f"| {losses[0]:.3f} | {losses[16]:.3f} |", "from_pretrained",
        lora.origin()["run"],
    ):  # fmt: skip
        assert said in card, said
    assert str(place.folder) not in card and not re.search(r"(^|\s)/", card)
