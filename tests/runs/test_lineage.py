"""The sources of models: exports name their step, and runs build on runs."""

import dataclasses
import gc
import json
import os
import re
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doors import run_door
from small_run import make_small_place, small_config

from research.checkpoints import __main__ as checkpoints_door
from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.checksums import seal
from research.checkpoints.needed_steps import needed_steps
from research.config.choices import ADAPTER_MODULES, TASK_MODULES
from research.config.data_knobs import ColumnsConfig
from research.config.run_config import CheckpointConfig, MeshConfig
from research.config.saved_config import to_json
from research.core.errors import UserError
from research.export import __main__ as export_door
from research.export.write_model import choose_options, write_model
from research.formats.base_model import open_base
from research.formats.export_format import ExportedAdapter, ExportOptions
from research.formats.huggingface.huggingface_export import (
    HuggingFaceFormat,
    save_settings,
)
from research.formats.load_parameters import load_base
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.parallel import runtime
from research.report.model_card import format_card
from research.runs import display_files
from research.runs.lineage import exported_run
from research.runs.lineage.base_of_run import (
    open_start,
    open_step,
    open_stored,
    start_architecture,
)
from research.runs.lineage.exported_run import ModelOrigin, refuse_other_step
from research.runs.lineage.start_pins import keep_base_step, pin_start, saved_step
from research.runs.phase_timer import PhaseTimer
from research.runs.reopen import reopen
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.tasks.findings import SYSTEM, Finding
from research.train import prepare_runs, start_to_report


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
    monkeypatch.setattr(HuggingFaceFormat, "write", None)
    before = content(exported)
    with caplog.at_level("INFO"):
        write_model(str(lora.path), "latest", exported, "float32", False)
    assert "holds step 16" in caplog.text and "nothing is written" in caplog.text
    assert content(exported) == before


def test_another_step_is_refused_until_the_flag(lora, exported, tmp_path, monkeypatch):
    out = shutil.copytree(exported, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds step 16 .*, and step 15 .*--replace"):
        write_model(str(lora.path), "15", out, "float32", False)
    with pytest.raises(UserError, match=r"in float32, and step 16 .* in bfloat16"):
        write_model(str(lora.path), "16", out, "bfloat16", False)
    assert content(out) == content(exported)
    findings = [Finding(SYSTEM, "Answer in *verse*.")]
    monkeypatch.setattr(display_files, "read_findings", lambda folder: findings)
    write_model(str(lora.path), "15", out, "float32", True)
    assert json.loads((out / "exported_from.json").read_text())["step"] == 15
    # The system text that all rows had is that of the export, and its card says so.
    assert 'system text: "Answer in \\*verse\\*."' in (out / "README.md").read_text()
    template = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert "'Answer in *verse*.'" in template


def test_several_formats_are_written_at_once(lora, tmp_path, caplog, monkeypatch):
    # A command would take the records for itself.
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    formats = ["hf", "peft", "gguf", "gguf-adapter"]
    wanted = (str(lora.path), "latest", tmp_path / "all", "float32", False, formats)
    write_model(*wanted)
    assert {x.name for x in (tmp_path / "all").iterdir()} == {*formats}
    for name in formats:
        folder = tmp_path / "all" / name
        facts = json.loads((folder / "exported_from.json").read_text())
        parity = json.loads((folder / "parity.json").read_text())
        assert (facts["format"], facts["step"]) == (name, 16)
        assert facts["verified"] in (folder / "README.md").read_text()
        assert "held-out rows of the run" in facts["verified"]
        assert parity["weights"] <= parity["limits"]["weights"] == 1
        assert parity["logits"] <= parity["limits"]["logits"]
        assert parity["largest"] < 1e-3 and parity["agreement"] == 1
        assert parity["architecture"] == "equal"
        card = (folder / "README.md").read_text()
        assert f"--format={name}" in card
        assert ("without the base model" in card) == (name in ("peft", "gguf-adapter"))
    before = {name: content(tmp_path / "all" / name) for name in formats}
    with caplog.at_level("INFO"):
        write_model(*wanted)
    assert caplog.text.count("nothing is written") == len(formats)
    assert before == {name: content(tmp_path / "all" / name) for name in formats}


def test_files_that_compute_something_else_are_removed(
    lora, exported, tmp_path, monkeypatch
):
    out = shutil.copytree(exported, tmp_path / "out")
    read_back = HuggingFaceFormat.read_back

    def spoilt(self, folder, exported):
        written = read_back(self, folder, exported)
        return dataclasses.replace(
            written,
            read=lambda path, index: written.read(path, index) * np.float32(1.01),
            layout=None,  # Its places in the file still hold the right numbers.
        )

    monkeypatch.setattr(HuggingFaceFormat, "read_back", spoilt)
    flags = ("export", f"--run={lora.path}", "--step=15", "--replace=True")
    for folder in (out, tmp_path / "new"):
        ended = run_door(export_door.main, tmp_path, *flags, f"--out={folder}")
        assert ended.returncode == 1
        assert ended.stderr.count("compute something else than the run") == 1
    assert content(out) == content(exported)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_a_quant_that_no_format_stores_is_refused(lora, tmp_path):
    said = r"--quant=q8_0: --format=hf,peft stores plain numbers"
    with pytest.raises(UserError, match=said):
        write_model(
            str(lora.path), "15", tmp_path, "float32", False, ["hf", "peft"], "q8_0"
        )
    for formats, dtype, quant, said in (
        (["gguf-adapter"], "float16", "", "gguf-adapter is stored in float32;"),
        (["gguf"], "float16", "q8_0", "gguf is stored in q8_0;"),
        (["gguf", "gguf-adapter"], "bfloat16", "q8_0", "q8_0 and gguf-adapter is "),
    ):
        with pytest.raises(UserError, match=rf"--dtype={dtype} has no effect.*{said}"):
            write_model(str(lora.path), "15", tmp_path, dtype, False, formats, quant)
    assert choose_options(["hf", "gguf"], "bfloat16", "q8_0") == {
        "hf": ExportOptions("bfloat16"), "gguf": ExportOptions("bfloat16", "q8_0"),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"--format is 'gguff'.*gguf"):
        write_model(str(lora.path), "15", tmp_path, "float32", False, ["gguff"])


def test_a_file_that_changed_is_not_the_same_export(lora, exported, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "README.md").write_text("my own words")
    with pytest.raises(UserError, match=r"README\.md of which has changed since"):
        write_model(str(lora.path), "latest", out, "float32", False)


@pytest.mark.parametrize("run", ["", "r"])
def test_another_checkpoint_of_the_same_step_is_refused(exported, tmp_path, run):
    """A run without an id may be any other one; a step may have been trained again."""
    out = shutil.copytree(exported, tmp_path / "out")
    facts = json.loads((out / "exported_from.json").read_text()) | {"run": run}
    (out / "exported_from.json").write_text(json.dumps(facts))
    same = ModelOrigin(run, 16, facts["checkpoint"], "float32")
    assert exported_run.holds(out, same, False, "--replace")
    for checkpoint, said in (("f" * 64, "ffffffffffff"), ("", "not saved yet")):
        other = same.saved_as(checkpoint)
        with pytest.raises(UserError, match=rf"another checkpoint .*\({said}\) would"):
            exported_run.holds(out, other, False, "--replace")
        assert not exported_run.holds(out, other, True, "--replace")


def test_the_files_of_another_step_are_not_read(exported, monkeypatch):
    monkeypatch.setattr(exported_run, "checksum", None)
    other = ModelOrigin("r", 15, "", "float32")
    with pytest.raises(UserError, match=r"holds step 16 .* step 15 "):
        exported_run.holds(exported, other, False, "--replace")


def test_what_is_not_of_an_export_is_never_replaced(lora, exported, tmp_path):
    """Nor the model of somebody else, nor the tokenizer of the run, nor notes."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "thesis.txt").write_text("years of work")
    foreign = shutil.copytree(exported, tmp_path / "foreign")
    (foreign / "exported_from.json").unlink()
    noted = shutil.copytree(exported, tmp_path / "noted")
    (noted / "notes.txt").write_text("my own")
    run = shutil.copytree(lora.path, tmp_path / "run")
    before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*") if x.is_file()}
    for out, said in (
        (tmp_path / "text", "has no exported_from.json"),
        (foreign, "has no exported_from.json"),
        (run / "tokenizer", "has no exported_from.json"),
        (run / "checkpoints" / "99", "lies among the files of a run.*/run/exports"),
        (run / "exports", "lies among the files of a run.*/run/exports"),
        (noted, "holds notes.txt, which is no part of the export"),
    ):
        with pytest.raises(UserError, match=said):
            write_model(str(run), "15", out, "", True)
    after = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*") if x.is_file()}
    assert after == before


def test_no_format_is_written_where_a_later_one_is_refused(pretrained, place, tmp_path):
    assert pretrained.code == 0, pretrained.err
    run = str(place.run_dir("pretrained"))
    with pytest.raises(UserError, match="it trained all its parameters"):
        write_model(run, "latest", tmp_path / "all", "", False, ["hf", "peft"])
    assert not [*tmp_path.iterdir()]


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


def card_of(run, path, step, data, changes, **knobs):
    """The card of a run with other knobs, which accepted `{step: {name: change}}`."""
    folder = RunDir(path)
    path.mkdir()
    config = run.config()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, **data), **knobs
    )
    (path / "config.json").write_text(to_json(config))
    (path / "identity.json").write_text(json.dumps(run.identity()))
    history = History(folder.history, PhaseTimer())
    for made, changed in changes.items():
        history.accept(changed, made)
    adapters = {x: ExportedAdapter({}, x, 8.0) for x in (4, 16, 8)}
    return format_card(folder, step, "", "text", adapters=adapters)


def test_the_card_names_the_data_of_an_added_task_and_its_adapters(
    lora, tmp_path, monkeypatch
):
    monkeypatch.setitem(TASK_MODULES, "pairs", __name__)
    monkeypatch.setitem(ADAPTER_MODULES, "scaled", __name__)
    kind = dataclasses.replace(lora.config().lora, kind="scaled")
    data = {"kind": "pairs", "path": "", "columns": ColumnsConfig()}
    card = card_of(lora, tmp_path / "a", 16, data, {}, lora=kind)
    assert "olly" not in card and "- data: read by the task 'pairs'" in card
    assert "adapters of the kind 'scaled' of rank 4 to 16 and alpha 8, " in card
    assert "LoRA" not in card
    named = card_of(lora, tmp_path / "b", 16, data | {"path": "/x/pairs.jsonl"}, {})
    assert "- data: pairs.jsonl\n" in named


@pytest.mark.parametrize(
    ("step", "data", "rows"),
    [
        (4, "first -> 1.jsonl", 2),
        (8, "first -> 1.jsonl, second.jsonl (from update 5 on)", 2),
        (9, "first -> 1.jsonl, second.jsonl (from update 5 on), third.jsonl "
         "(from update 9 on)", 8),
    ],
)  # fmt: skip
def test_the_card_names_what_was_trained_up_to_its_step(
    lora, tmp_path, step, data, rows
):
    changes = {
        4: {"data.path": "'/home/x/first -> 1.jsonl' -> '/home/x/second.jsonl'"},
        8: {
            "data.path": "'/home/x/second.jsonl' -> 'third.jsonl'",
            "data.batch_size": "2 -> 8",
        },
    }
    now = {"path": "third.jsonl"}
    card = card_of(lora, tmp_path / "a", step, now, changes).replace("\\", "")
    assert f"- data: {data}\n" in card.replace("&gt;", ">")
    assert f"- steps: {step} of {rows} rows" in card and "/home" not in card
    assert ("batch_size: 2 -" in card) == (step > 8)


# -- a run that builds on another run --------------------------------------------------


def loaded(base, mesh, dtype):
    return load_base(base, Model(base.architecture), mesh, dtype, 0)


@pytest.mark.parametrize(
    ("dtype", "sizes"), [("bfloat16", (1, 1, 1)), ("float32", (2, 2, 2))]
)
def test_a_run_as_the_base_is_its_export_bit_for_bit(lora, exported, dtype, sizes):
    """The same parameters, shape, tokenizer and ends, and no file is written."""
    before = sorted(lora.path.rglob("*"))
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    data, fsdp, tensor = sizes
    mesh = meshes.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    base = open_step(str(lora.path), "latest")
    other = open_base(str(exported))
    found, expected = loaded(base, mesh, dtype), loaded(other, mesh, dtype)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype == dtype
        assert found[path].sharding == value.sharding, path
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert base.architecture == other.architecture
    for name in ("fingerprint", "end_ids", "chat_template"):
        assert getattr(base.tokenizer, name) == getattr(other.tokenizer, name), name
    assert sorted(lora.path.rglob("*")) == before


def test_fully_trained_parameters_are_read_as_they_were_saved(place, pretrained):
    assert pretrained.code == 0, pretrained.err
    run = reopen(place.run_dir("pretrained"))
    base = open_step(str(place.run_dir("pretrained")), "12")
    found = loaded(base, run.mesh, "float32")
    for path, value in run.params.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert base.tokenizer.fingerprint == run.base.tokenizer.fingerprint


def test_a_chain_of_runs_adds_the_adapters_of_each(lora, tmp_path):
    """B holds the adapters of A once more: A's weights and twice its update."""
    second = tmp_path / "second"
    shutil.copytree(lora.path, second)
    base = open_step(str(lora.path), "16")
    own = {"base model": base.fingerprint}
    # As a start writes it; the checkpoints of a run do not name its base run.
    found = lora.identity() | own | dict(base.origin)
    (second / "identity.json").write_text(json.dumps(found))
    config = dataclasses.replace(
        lora.config(), model=at(lora.config().model, f"{lora.path}@16")
    )
    (second / "config.json").write_text(to_json(config))
    for step in (second / "checkpoints").iterdir():
        reseal(step, own)
    mesh = meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    zero = loaded(open_base(str(lora.config().model.init_from)), mesh, "float32")
    once = loaded(base, mesh, "float32")
    twice = loaded(open_step(str(second), "latest"), mesh, "float32")
    changed = 0
    for path, value in once.items():
        expected = value + (value - zero[path])
        np.testing.assert_allclose(twice[path], expected, rtol=0, atol=1e-6)
        changed += bool(np.abs(value - zero[path]).max() > 1e-3)
    assert changed == 7


def at(model, start):
    return dataclasses.replace(model, init_from=start)


def reseal(step, identity):
    """Writes another identity into a checkpoint, and its checksums anew."""
    file = step / "meta" / "metadata"
    meta = json.loads(file.read_bytes())
    file.write_text(json.dumps(meta | {"identity": meta["identity"] | identity}))
    for folder in sorted({x.parent for x in step.rglob("sums.json")}, reverse=True):
        seal(folder)


@pytest.fixture
def built(lora, tmp_path, monkeypatch):
    """Makes a run directory on the run `a`, which a test may change; trains nothing."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lora.path, "a")

    def build(name, start, trainable="lora"):
        config = dataclasses.replace(
            lora.config(), trainable=trainable, run_dir=name,
            model=at(lora.config().model, start),
        )  # fmt: skip
        folder = RunDir(name)
        assert folder.check_config(config) == {}
        pinned = pin_start(folder, config)
        base = open_start(pinned, folder)
        identity = {
            "base model": base.fingerprint, "data": "d",
            "tokenizer": base.tokenizer.fingerprint, **base.origin,
        }  # fmt: skip
        with folder.create(pinned, identity, []):
            save_settings(base.architecture, base.tokenizer, folder.tokenizer)
        folder._lock.release()
        return config, RunDir(name)

    return build


def train_on(step):
    """Saves a later step of the run `a`, which keeps nothing but its newest one."""
    keep = CheckpointConfig(keep_last=1, keep_best=0)
    with Checkpointer(RunDir("a").checkpoints, keep, RunDir("a").identity()) as saver:
        saver.save(step, {"params": jnp.ones(4)}, {}, None)
    return sorted(int(x.name) for x in Path("a/checkpoints").iterdir())


@pytest.mark.parametrize(("start", "step"), [("a", 16), ("a@best", None), ("a@15", 15)])
def test_a_run_keeps_the_step_that_it_was_built_on(lora, built, start, step):
    """Whatever becomes of the other run, and from wherever the path is written."""
    config, folder = built("b", start)
    step = step or saved_step(lora, "best")
    identity = folder.identity()
    assert identity["base run"] == lora.origin()["run"]
    assert identity["base step"] == str(step) and identity["base checkpoint"]
    keep_base_step(folder, folder.config().model.init_from)
    write_model("a", "15", Path("a/model"), "float32", False)
    assert train_on(17) == [step, 17]
    for written in (start, os.path.abspath(start), f"a@{step}"):
        again = dataclasses.replace(config, model=at(config.model, written))
        assert folder.check_config(again) == {}
        pinned = pin_start(RunDir("b"), again)
        assert pinned.model.init_from.endswith(f"a@{step}")
        assert open_start(pinned, folder).fingerprint == identity["base model"]
    assert open_stored("b").base.name.endswith(f"a@{step}")
    other = dataclasses.replace(config, model=at(config.model, "a@17"))
    with pytest.raises(UserError, match=rf"init_from: 'a@{step}' -> 'a@17'"):
        folder.check_config(other)


def record(folder, monkeypatch):
    """Records a start of the run of adapters in `folder`; trains nothing."""
    monkeypatch.setattr(prepare_runs.doctor, "save", lambda *_: None)
    run = types.SimpleNamespace(
        folder=folder, config=folder.config(), examination=None,
        history=types.SimpleNamespace(plan=lambda steps: None),
        definition=types.SimpleNamespace(
            trainable=types.SimpleNamespace(frozen_specs={"x": None})
        ),
    )  # fmt: skip
    opened = types.SimpleNamespace(changed={}, config=run.config)
    prepare_runs.record_start(run, {}, opened, 0)


def test_a_start_keeps_the_step_under_its_adapters_while_the_run_is_there(
    built, monkeypatch, capsys
):
    """Neither training nor a prune removes it; once that run is gone both do."""
    prune = ["checkpoints", "prune", "--run=a", "--keep_best=0"]
    _, folder = built("b", "a@15")
    record(folder, monkeypatch)
    assert needed_steps(Path("a")) == {15: os.path.abspath("b")}
    checkpoints_door.main(prune)
    assert "step 15 stays" in capsys.readouterr().out
    assert train_on(17) == [15, 17]
    config = folder.config()
    os.rename("b", "moved")
    assert needed_steps(Path("a")) == {}
    monkeypatch.setattr(RunDir, "is_complete", True)
    moved = dataclasses.replace(config, run_dir="moved")
    assert start_to_report._open_unfinished([moved]) == []
    assert needed_steps(Path("a")) == {15: os.path.abspath("moved")}
    os.rename("moved", "b")
    identity = folder.identity() | {"base step": "17"}
    (folder.path / "identity.json").write_text(json.dumps(identity))
    assert needed_steps(Path("a")) == {}, "it starts from another step by now"
    shutil.rmtree("b")
    assert train_on(18) == [18]


def test_a_base_run_that_cannot_be_written_gets_a_warning(built, monkeypatch, caplog):
    _, folder = built("b", "a@16")
    Path("a/needed_by").write_text("")
    record(folder, monkeypatch)
    assert "may remove the step" in caplog.text
    assert "/a export-step --step=16 --out=FOLDER" in caplog.text


def test_another_checkpoint_under_the_same_number_is_another_base(built):
    built("b", "a@16")
    shutil.rmtree("a/checkpoints/16")
    shutil.copytree("a/checkpoints/15", "a/checkpoints/16")
    (Path("a/checkpoints/16") / "commit_success.txt").write_text("16")
    seal(Path("a/checkpoints/16"))
    with pytest.raises(UserError, match="base model"):
        open_stored("b")


@pytest.mark.parametrize("gone", ["a", "a/checkpoints/16"])
def test_without_the_base_run_adapters_say_what_is_missing(built, gone, lora):
    config, folder = built("b", "a")
    shutil.rmtree(gone)
    run = lora.origin()["run"]
    for action in (
        lambda: open_start(pin_start(folder, config), folder),
        lambda: open_stored("b"),
    ):
        with pytest.raises(
            UserError,
            match=rf"a@16 \(step 16 of run {run}\).*bring.*"
            r"python -m research\.train --config=.*b --config\.model\.init_from=FOLDER",
        ):
            action()


def test_without_the_base_run_full_training_still_opens(built, caplog):
    config, folder = built("b", "a", "full")
    before = open_stored("b").base
    shutil.rmtree("a")
    base = open_start(pin_start(folder, config), folder)
    assert "in the run's own checkpoints" in caplog.text
    assert base.architecture == before.architecture
    assert base.fingerprint == before.fingerprint
    assert base.origin == before.origin != {}, "it is written again with accepted knobs"
    assert base.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert base.tokenizer.end_ids == before.tokenizer.end_ids
    with pytest.raises(UserError, match="no run directory"):
        base.tensors.read("model.norm.weight")


def test_an_older_run_stays_with_the_export_of_its_base_run(built, exported):
    """Its config has no step, and its identity is that of the exported files."""
    shutil.copytree(exported, "a/model")
    config, folder = built("b", "a/model")
    (folder.path / "hub_revisions.json").unlink(missing_ok=True)
    older = dataclasses.replace(config, model=at(config.model, "a"))
    (folder.path / "config.json").write_text(to_json(older))
    assert folder.check_config(older) == {}
    pinned = pin_start(folder, older)
    assert pinned.model.init_from == "a"
    assert open_start(pinned, folder).fingerprint == open_base("a/model").fingerprint
    assert open_stored("b").base.fingerprint == folder.identity()["base model"]


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("a@99", r"no checkpoint '99'; it has steps .*15, 16"),
        ("b@best", r"base model b@best: b is no run directory"),
    ],
)
def test_a_step_that_is_not_there_is_named(built, start, said):
    with pytest.raises(UserError, match=said):
        built("new", start)


def test_the_plan_needs_no_export(built, lora):
    config, _ = built("b", "a@15")
    assert start_architecture(config) == open_stored(lora.path).base.architecture


@pytest.mark.soak
def test_full_training_resumes_after_its_base_run_is_gone(tmp_path):
    """Its own checkpoint has all parameters; the report has no base answers."""
    make_small_place(tmp_path)
    first = small_config(tmp_path, "first", 2)
    assert start_to_report.train([first]) == 0
    second = dataclasses.replace(
        small_config(tmp_path, "second", 2), trainable="full",
        model=at(first.model, first.run_dir),
    )  # fmt: skip
    assert start_to_report.train([second]) == 0
    identity = RunDir(second.run_dir).identity()
    shutil.rmtree(first.run_dir)
    gc.collect()  # The lock of the start before.
    longer = dataclasses.replace(
        second, steps=4, accept=("steps",), replace_export=True
    )
    assert start_to_report.train([longer]) == 0
    assert RunDir(second.run_dir).identity() == identity
    assert RunDir(second.run_dir).is_complete
    origin = Path(second.run_dir) / "model" / "exported_from.json"
    assert json.loads(origin.read_text())["step"] == 4
