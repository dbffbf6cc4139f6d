"""After a crash at any point the files of a run are right, or say what is gone.

`crash_points.py` says which states a crash may leave. Each of them is opened by the
code that opens it for users. A promise is a fact that the run has reported or relied
on: it must hold in every later state.
"""

import gc
import hashlib
import os
from types import SimpleNamespace

import pytest
from crash_points import Recorder, crash_states
from helpers import random_params
from small_run import make_small_place, small_config
from small_states import FUTURES, IDENTITY, POSITION, abstract, equal, make_state
from tiny_model import make_tiny_model, random_weights

from research.checkpoints.checkpoint_listing import inspect
from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import CheckpointConfig, Config
from research.core.atomic_files import make_folder
from research.core.errors import UserError
from research.data.text import choose_tokenizer, token_shards
from research.data.text.token_shards import SIDES, TextTotals, TokenManifest, TokenShard
from research.formats.base_model import open_base
from research.formats.export_names import EXPORTED
from research.formats.huggingface import huggingface_export
from research.models.transformer import Model
from research.runs import metrics_file, run_history
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.tokenize.tokenizer import from_folder
from research.tokenize.tokenizer_training import byte_tokenizer, save_tokenizer
from research.train import start_to_report

pytestmark = FUTURES


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.soak)])
def states(request, monkeypatch):
    """`states.each(recorder, check)` checks one state after the other, in its place."""
    # A real sync takes time, and here no power is lost.
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def each(recorder, check):
        count = 0
        for state in crash_states(recorder, by_folder=request.param):
            state.put_back(recorder.top)
            count += 1
            try:
                check(state)
            except BaseException as error:
                error.add_note(f"after a crash: {state.what}")
                raise
        print(f"{count} states of {len(recorder.log)} operations")
        assert count > len(recorder.log) / 2

    return SimpleNamespace(each=each, thorough=request.param)


def open_checkpoints(run, history):
    keep = CheckpointConfig(keep_last=1, keep_best=1)
    return Checkpointer(run.checkpoints, keep, IDENTITY, committed=history.commit)


def test_a_saved_step_outlives_a_crash(states, tmp_path):
    """Two steps are kept: the best, and the last."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    history = History(run.history, PhaseTimer())
    losses = {1: 2.5, 2: 2.0} | ({3: 2.25} if states.thorough else {})
    with Recorder(run.path) as recorder, open_checkpoints(run, history) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), POSITION, loss)
            checkpoints.wait()
            recorder.mark(step)
    tried = set()

    def check(state):
        found = inspect(run.checkpoints)
        whole = [x.step for x in found if not x.damage]
        promised = max(state.promises, default=0)
        saved = run_history.read(run.history)["saved"]
        assert promised <= saved <= max(whole, default=0)
        assert promised < 2 or 2 in whole, "the best step is gone"
        # A restore takes a tenth of a second, and reads bytes that are equal by then.
        outcome = (*whole,), len(found), promised
        if states.thorough or outcome not in tried:
            tried.add(outcome)
            trial = RunDir(tmp_path / "trial")
            trial.path.mkdir(exist_ok=True)
            state.put_back(trial.path)
            with open_checkpoints(trial, history) as again:
                restored = again.restore(abstract(make_state(0)))
                again.save(9, make_state(9), POSITION, None)
            assert bool(restored) == bool(whole)
            if restored:
                assert restored.step == whole[-1] and restored.position == POSITION
                assert equal(restored.state, make_state(restored.step))
            left = [path.name for path in trial.checkpoints.iterdir()]
            assert "9" in left and all(name.isdecimal() for name in left)

    states.each(recorder, check)
    assert {whole for whole, *_ in tried} >= {(), (1,), (1, 2), (2,)}


def test_metrics_and_history_outlive_a_crash(states, tmp_path):
    history = History(tmp_path / "run.json", PhaseTimer())
    more = {"tokens": 9, "elapsed_s": 1.5, "memory_gb": 0.0}
    values = [{"loss": 1 / (i + 1), **more} for i in range(5)]
    lines = [{"step": i, "kind": "train", **x} for i, x in enumerate(values)]
    with Recorder(tmp_path) as recorder:
        history.begin()
        file = metrics_file.MetricsFile(tmp_path, 0)
        for i, line in enumerate(values[:4]):
            file.write(i, "train", line)
            if i % 2:
                file.sync()
                recorder.mark(("lines", i + 1))
                history.note(i)
                recorder.mark(("noted", i))
        file.close()
        metrics_file.append_line(tmp_path, 4, "train", values[4])
        recorder.mark(("lines", 5))

    def check(state):
        promised = {"lines": 0, "noted": None} | dict(state.promises)
        found = metrics_file.read_metrics(tmp_path)
        assert all(line.pop("time") for line in found)
        assert found == lines[: len(found)] and len(found) >= promised["lines"]
        starts = run_history.read(tmp_path / "run.json")["starts"]
        noted = starts[-1]["step"] if starts else None
        assert promised["noted"] is None or noted >= promised["noted"]

    states.each(recorder, check)


def test_a_run_that_exists_can_be_opened(states, tmp_path):
    """Otherwise the same command makes it."""
    place = tmp_path / "place"
    place.mkdir()
    config = Config(run_dir=str(place / "runs" / "new"))
    tokenizer, others = byte_tokenizer(), IDENTITY | {"data": "other rows"}

    def create():
        run = RunDir(config.run_dir)
        with run.create(config, IDENTITY, ["rows.jsonl:3: empty"]):
            save_tokenizer(tokenizer, run.tokenizer)
        run._lock.release()
        return run

    with Recorder(place) as recorder:
        run = create()
        recorder.mark("made")
        run.mark_complete({})
        run.update(others, [], config)
        recorder.mark("made for other data")

    def check(state):
        run = RunDir(config.run_dir)
        assert run.exists or not state.promises
        assert run.check_config(config) == {}
        if not run.exists:
            create()
        accepted = run.check_identity(others, ("data",))
        assert not accepted or len(state.promises) < 2
        assert not run.is_complete or accepted, "complete without the other data"
        assert from_folder(run.own_tokenizer).fingerprint == tokenizer.fingerprint

    states.each(recorder, check)


def export(folder, seed, base):
    model = Model(base.architecture)
    params = random_params(model.specs, seed)
    huggingface_export.export(model, params, base.tokenizer, folder)


@pytest.mark.parametrize("files", [1, 3])
def test_a_complete_run_has_its_export(states, tmp_path, monkeypatch, files):
    """While an export replaces another, a line may say that there is none."""
    size = sum(tensor.nbytes for tensor in random_weights(0).values())
    monkeypatch.setattr(huggingface_export, "FILE_BYTES", size * 2 // (2 * files - 1))
    base = open_base(str(make_tiny_model(tmp_path / "base")))
    run, made = RunDir(tmp_path / "run"), []
    run.checkpoints.mkdir(parents=True)
    with Recorder(run.path) as recorder:
        for seed in (1, 2):
            export(run.path / EXPORTED, seed, base)
            made.append(open_base(str(run.path)).fingerprint)
            recorder.mark(f"export {seed}")
            run.mark_complete({"export": seed})
            recorder.mark(f"complete {seed}")
    assert len(list((run.path / EXPORTED).glob("*.safetensors"))) == files

    def check(state):
        exports = sum(x.startswith("export") for x in state.promises)
        complete, replaced = run.is_complete, "complete 1" in state.promises
        assert complete or not replaced
        try:
            found = open_base(str(run.path))
        except UserError as error:
            assert exports == complete == replaced
            assert f"{run.path} is a run without an exported model" in str(error)
        else:
            assert found.fingerprint in made[max(exports, 1) - 1 : exports + 1]
            assert found.tokenizer.fingerprint == base.tokenizer.fingerprint

    states.each(recorder, check)


def test_a_finished_shard_outlives_a_crash(states, tmp_path):
    folder = tmp_path / "cache" / "tokens"
    ids = [[bytes([n, side, 7, 0]) * 20 for side in (0, 1)] for n in (0, 1)]
    totals = TextTotals(documents=1, tokens=40, bytes=40)
    shards = [
        TokenShard(
            unit=0, number=n, pieces=1, train=totals, held=totals, held_lengths=[40],
            held_continues=False, last=n == 1, left_out={},
            sha256=[hashlib.sha256(x).hexdigest() for x in ids[n]],
        )
        for n in (0, 1)
    ]  # fmt: skip
    manifest = TokenManifest("key", "<u2", shards)
    (tmp_path / "cache").mkdir()
    with Recorder(tmp_path / "cache") as recorder:
        make_folder(folder)
        for shard in shards:
            token_shards.write_shard(folder, shard, ids[shard.number], "<u2")
            recorder.mark(shard.number)
        token_shards.write_manifest(folder, manifest)
        recorder.mark("manifest")

    def check(state):
        listed = token_shards.read_manifest(folder, "key")
        assert listed == manifest or (
            listed is None and "manifest" not in state.promises
        )
        for shard in shards:
            found = token_shards.read_shard(folder, 0, shard.number, "<u2")
            assert found == shard or (
                found is None and shard.number not in state.promises
            )
            files = [shard.file(folder, side, "<u2") for side in SIDES]
            assert not found or [x.read_bytes() for x in files] == ids[shard.number]

    states.each(recorder, check)


def test_a_trained_tokenizer_outlives_a_crash(states, tmp_path):
    """Other runs take a folder that is there for a tokenizer that is whole."""
    folder, tokenizer = tmp_path / "bpe300-0", byte_tokenizer()
    with Recorder(tmp_path) as recorder:
        choose_tokenizer._keep(tokenizer, folder)
        recorder.mark("kept")

    def check(state):
        assert folder.is_dir() or not state.promises
        if folder.is_dir():
            assert from_folder(folder).fingerprint == tokenizer.fingerprint

    states.each(recorder, check)


@pytest.mark.soak
@pytest.mark.parametrize("states", [True], indirect=True)
def test_a_run_that_crashes_anywhere_ends_as_the_unbroken_one(states, tmp_path):
    make_small_place(tmp_path)
    (tmp_path / "runs").mkdir()
    config = small_config(tmp_path, "runs/run", 4)
    with Recorder(tmp_path / "runs") as recorder:
        assert start_to_report.train([config]) == 0
    run, tried = RunDir(config.run_dir), set()

    def losses():
        lines = metrics_file.read_metrics(run.path)
        return [(x["step"], x["kind"], x["loss"]) for x in lines if "loss" in x]

    unbroken = open_base(config.run_dir).fingerprint, losses()

    def check(state):
        found = inspect(run.checkpoints)
        whole = [x.step for x in found if not x.damage]
        assert run_history.read(run.history)["saved"] <= max(whole, default=0)
        complete = run.is_complete
        if complete:
            assert (open_base(config.run_dir).fingerprint, losses()) == unbroken
            assert (run.path / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")
            assert (run.path / "report.md").read_text().endswith("\n")
        outcome = (run.exists, complete, *((x.step, bool(x.damage)) for x in found))
        if outcome not in tried:
            tried.add(outcome)
            gc.collect()  # The lock of the start before.
            assert start_to_report.train([config]) == 0
            assert (open_base(config.run_dir).fingerprint, losses()) == unbroken

    states.each(recorder, check)
    assert len(tried) > 4
