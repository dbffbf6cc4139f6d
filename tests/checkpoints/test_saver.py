"""A run's saves: what a failure does by its policy, and what steps notice of them."""

import errno
import functools
import itertools
import json
import os
import statistics
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from small_states import IDENTITY, POSITION, abstract, equal, make_state
from waiting import PATIENCE, wait_until

from research.checkpoints import checksums
from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.checksums import find_damage
from research.config.run_config import CheckpointConfig, Config, RuntimeConfig
from research.core.errors import DamagedError, DivergedError, SaveError, UserError
from research.data.metric_sums import Ratio
from research.runs import metrics_file
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.train import finish_run, restore_run, training_loop
from research.train.fit_runs import _TrainingPass
from research.train.metrics import throughput
from research.train.metrics.metrics_log import StepLog
from research.train.restore_run import restore
from research.train.run_saver import RunSaver
from research.train.training_run import TrainingRun

# A failed save leaves Orbax futures behind whose errors nobody reads.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)


class Feed:
    """Numbers its batches, which are all the same."""

    number, position = -1, POSITION

    def __next__(self):
        self.number += 1
        return None


class Log:
    """Keeps what it is told; the metrics are read, which waits for the step."""

    def __init__(self):
        self.losses = []

    def __call__(self, number, batch, loss):
        self.losses.append(float(loss))

    def sync(self):
        pass


def make_run(folder, **checkpoint):
    run_dir = RunDir(folder)
    history = History(run_dir.history, PhaseTimer())
    history.begin()
    history.resume_from(0)
    config = Config(checkpoint=CheckpointConfig(**checkpoint))
    run = SimpleNamespace(
        config=config, folder=run_dir, history=history, evaluated=None, answered=None
    )
    run.warn = functools.partial(TrainingRun.warn, run)
    return run


def open_checkpoints(run, **options):
    return Checkpointer(
        run.folder.checkpoints,
        run.config.checkpoint,
        IDENTITY,
        committed=run.history.commit,
        **options,
    )


def make_saver(run, checkpointer, log=None):
    return RunSaver(
        run, checkpointer, log or Log(), lambda: Feed().position, throughput.Clock()
    )


@pytest.fixture
def disk(monkeypatch):
    """`full`: whether it is, for whatever seals a save in the background."""
    state, seal = SimpleNamespace(full=False), checksums.seal

    def seal_or_fail(folder):
        if state.full:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        seal(folder)

    monkeypatch.setattr(checksums, "seal", seal_or_fail)
    return state


def is_saving(checkpointer):
    return checkpointer._manager.is_saving_in_progress()


def until_it_is_known(saver, checkpointer):
    """Steps go on after a save, and one of them learns how it ended."""
    steps = itertools.count()
    wait_until(lambda: saver.check(next(steps)) or checkpointer._pending is None)


# -- policies ------------------------------------------------------------------------


def test_a_failed_save_stops_the_run(tmp_path, disk):
    run = make_run(tmp_path)
    with open_checkpoints(run) as checkpointer:
        saver = make_saver(run, checkpointer)
        saver(5, make_state(5))
        checkpointer.wait()
        disk.full = True
        saver(10, make_state(10))
        with pytest.raises(SaveError, match=r"step 10 .* left: 5") as failed:
            until_it_is_known(saver, checkpointer)
        assert failed.value.step == 10
    assert run.history.saved == 5


def test_a_failed_save_is_told_of_and_the_run_goes_on(tmp_path, disk):
    run = make_run(tmp_path, on_error="go_on")
    with open_checkpoints(run) as checkpointer:
        saver = make_saver(run, checkpointer)
        saver(5, make_state(5))
        checkpointer.wait()
        disk.full = True
        saver(10, make_state(10))
        until_it_is_known(saver, checkpointer)  # By a step in between,
        saver(15, make_state(15))
        saver(20, make_state(20))  # by the next save,
        wait_until(lambda: not is_saving(checkpointer))
        disk.full = False  # and by the last.
        saver.finish(25, make_state(25))
        assert checkpointer.steps == [5, 25]
        assert find_damage(run.folder.checkpoints / "5") == []
        assert equal(
            checkpointer.restore(abstract(make_state(0))).state, make_state(25)
        )
    found = json.loads(run.folder.history.read_text())
    events = [event["what"] for event in found["events"]]
    assert len(events) == 3
    for event, step in zip(events, (10, 15, 20), strict=True):
        assert event.startswith(f"step {step} could not be saved: ")
        assert "No space left" in event and "config.checkpoint.on_error" in event
    assert found["saved"] == found["starts"][0]["step"] == 25


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_the_last_save_must_succeed(tmp_path, disk, policy):
    run = make_run(tmp_path, on_error=policy)
    with open_checkpoints(run) as checkpointer:
        saver = make_saver(run, checkpointer)
        saver(5, make_state(5))
        checkpointer.wait()
        disk.full = True
        with pytest.raises(SaveError, match="step 6 could not be saved"):
            saver.finish(6, make_state(6))
    assert run.history.saved == 5


# -- rights --------------------------------------------------------------------------


@pytest.fixture(params=[errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def unwritable(request, monkeypatch):
    """`unwritable(name)`: no such folder is made, nor a file in it; not by root."""

    def refuse(name):
        def refusing(function):
            def call(path, *rest, **options):
                writes = function is not os.open or rest[0] & (os.O_WRONLY | os.O_RDWR)
                if name in os.fspath(path).split(os.sep) and writes:
                    raise OSError(request.param, os.strerror(request.param), path)
                return function(path, *rest, **options)

            return call

        for called in ("mkdir", "open", "rename", "replace"):
            monkeypatch.setattr(os, called, refusing(getattr(os, called)))

    return refuse


def check_one_line(error, *names):
    said = str(error.value)
    assert "\n" not in said
    assert "Read-only file system" in said or "Permission denied" in said
    for name in names:
        assert name in said


def test_a_run_folder_that_cannot_be_made_is_said(tmp_path, unwritable):
    unwritable("run")
    folder = RunDir(tmp_path / "run")
    with pytest.raises(UserError) as refused, folder.create(Config(), IDENTITY, []):
        pass
    check_one_line(refused, f"run directory {folder.path} cannot be written")
    assert not folder.path.exists()


def test_a_run_folder_that_can_no_more_be_written_is_said(tmp_path, unwritable):
    folder = RunDir(tmp_path / "run")
    with folder.create(Config(), IDENTITY, []):
        pass
    folder._lock.release()
    unwritable("run")
    with pytest.raises(UserError) as refused:
        RunDir(tmp_path / "run").lock()
    check_one_line(refused, f"run directory {folder.path} cannot be written")


def test_a_checkpoint_folder_that_cannot_be_made_is_said(tmp_path, unwritable):
    run = make_run(tmp_path)
    unwritable("checkpoints")
    with pytest.raises(UserError) as refused:
        open_checkpoints(run)
    check_one_line(refused, str(run.folder.checkpoints), "give back the right")


def test_a_right_to_write_that_is_lost_is_said_of_its_step(tmp_path, unwritable):
    run = make_run(tmp_path)
    with open_checkpoints(run) as checkpointer:
        saver = make_saver(run, checkpointer)
        saver(5, make_state(5))
        checkpointer.wait()
        unwritable("checkpoints")
        with pytest.raises(SaveError) as failed:
            saver.finish(6, make_state(6))
    check_one_line(failed, "step 6 could not be saved", "checkpoints left: 5")
    assert find_damage(run.folder.checkpoints / "5") == []


def test_metrics_that_cannot_be_opened_are_said(tmp_path, monkeypatch):
    def refuse(folder, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr(metrics_file, "MetricsFile", refuse)
    with pytest.raises(SaveError) as failed:
        make_log(tmp_path, first=7)
    check_one_line(failed, "the metrics of step 7")


def test_a_report_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def refuse(run, steps):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "report.md")

    monkeypatch.setattr(finish_run, "_finish", refuse)
    (tmp_path / "config.json").touch()
    with pytest.raises(SaveError) as failed:
        finish_run.finish(make_run(tmp_path), 10)
    check_one_line(failed, "steps are saved", "report.md")


# -- a run whose checkpoints are gone ------------------------------------------------


@pytest.mark.parametrize("trace", ["history", "set aside"])
def test_a_run_that_was_saved_never_begins_at_step_0(tmp_path, trace):
    run = make_run(tmp_path)
    if trace == "history":
        run.history.commit(5)
    else:
        (run.folder.path / "damaged").mkdir()
    definition, run.state = object(), object()  # Nothing is read, nor made anew.
    run.definition = definition
    with open_checkpoints(run) as checkpointer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore_run.train_step, "abstract_state", lambda _: {})
        with pytest.raises(DamagedError, match="no checkpoint: bring one back"):
            restore(run, checkpointer)


# -- a slow disk ---------------------------------------------------------------------


def train(run, checkpointer, step_fn, state, steps, every, told):
    """`steps` real steps, saved every so many: was a save under way, and seconds."""
    log, taken, mark = Log(), [], [0.0]
    saver = make_saver(run, checkpointer, log)

    def timed(number, batch, loss):
        begun_beside = is_saving(checkpointer)
        log(number, batch, loss)
        saver.check(number)
        now = time.perf_counter()
        taken.append((begun_beside and is_saving(checkpointer), now - mark[0]))
        told(number)
        mark[0] = time.perf_counter()

    def resume():
        mark[0] = time.perf_counter()

    training_loop.run(
        state=state,
        first=0,
        total=steps,
        batches=Feed(),
        step_fn=step_fn,
        actions=[training_loop.Action("save", every, saver)],
        log=timed,
        resume_clock=resume,
        stop=SimpleNamespace(is_due=lambda: False),
        phases=PhaseTimer(),
        requests=SimpleNamespace(agreed=frozenset),
    )
    return taken[1:]


def test_a_slow_disk_holds_no_step_up_but_the_next_save(tmp_path, monkeypatch):
    """The very steps, log and saves of a run; each save takes as long as 30 of them.

    It has ended when 15 more are over, however long the disk takes.
    """
    seal, writable = checksums.seal, threading.Event()

    def seal_slowly(folder):
        if folder.parent.name == "checkpoints":
            assert writable.wait(PATIENCE)
        seal(folder)

    def told(number):
        # In turn: what else this machine does slows steps of both kinds.
        if number % 50 == 30:
            writable.set()
            wait_until(lambda: not is_saving(checkpointer))
        elif number % 50 == 45:
            writable.clear()

    def work(x):
        time.sleep(0.02)  # As an accelerator does: the host is free.
        return x

    @jax.jit
    def update(state):
        w = jax.pure_callback(work, state["w"], state["w"])
        return {"w": w + 1.0}, w.sum()

    monkeypatch.setattr(checksums, "seal", seal_slowly)
    run, state = make_run(tmp_path), {"w": jnp.zeros((512, 512))}
    with open_checkpoints(run) as checkpointer:
        taken = train(run, checkpointer, lambda s, _: update(s), state, 200, 50, told)
        assert run.history.saved == 150 and is_saving(checkpointer)
        opening = threading.Timer(0.5, writable.set)
        opening.start()
        make_saver(run, checkpointer)(201, state)
        assert writable.is_set(), "the next save did not wait for the one before"
        assert run.history.saved == 200
    beside = [seconds for saving, seconds in taken if saving]
    alone = [seconds for saving, seconds in taken if not saving]
    assert len(beside) > 60 and len(alone) > 60
    # A step that waited for the save would take as long as thirty.
    assert statistics.median(beside) < 3 * statistics.median(alone)


# -- the best step -------------------------------------------------------------------


@pytest.mark.parametrize("keep_best", [0, 2])
def test_the_best_steps_measured_are_kept_wherever_saves_fall(tmp_path, keep_best):
    """Evaluations and saves at intervals that rarely meet; the loss rises again."""
    losses = {0: 2.0, 3: 5.0, 6: 4.0, 9: 4.5, 11: 9.0}
    run = make_run(tmp_path, keep_last=1, keep_best=keep_best)
    with open_checkpoints(run) as checkpointer:
        saver = make_saver(run, checkpointer)

        def evaluate(number, state):
            run.evaluated = (number, losses[number])

        loop = SimpleNamespace(_active=lambda: [0], _savers=[saver], _save=saver)
        action = training_loop.Action
        training_loop.run(
            state={"w": jnp.zeros(8)},
            first=0,
            total=11,
            batches=Feed(),
            step_fn=lambda state, _: ({"w": state["w"] + 1}, jnp.float32(0)),
            actions=[
                action("evaluate", 3, evaluate, at_start=True),
                action("save", 4, saver),
                action("save", 3, functools.partial(_TrainingPass._save_best, loop)),
            ],
            log=Log(),
            resume_clock=lambda: None,
            stop=SimpleNamespace(is_due=lambda: False),
            phases=PhaseTimer(),
            requests=SimpleNamespace(agreed=frozenset),
        )
        checkpointer.wait()
        assert checkpointer.steps == sorted({11, *(6, 9)[:keep_best]})
        assert checkpointer.best_step == (6 if keep_best else 11)


# -- numbers that are not finite -----------------------------------------------------


def make_log(folder, first=0):
    runtime = RuntimeConfig(peak_tflops=1.0, progress="lines")
    return StepLog(
        Config(steps=10, runtime=runtime),
        folder,
        Console(quiet=True),
        throughput.Clock(),
        throughput.FlopCount(1.0, 1.0, 1.0),
        ["all"],
        first,
        PhaseTimer(),
    )


def test_of_two_groups_the_one_that_is_not_finite_is_named(tmp_path):
    log = make_log(tmp_path)
    sums = {
        "means": {"loss": jnp.float32(2.0)},
        "sums": {"loss": Ratio(jnp.float32([16.0]), jnp.float32([8.0]))},
        "grad_norm": jnp.float32(jnp.nan),
        "param_norm": jnp.float32(1.0),
        "tokens": jnp.float32(8),
        "weight": jnp.float32(8),
        "pairs": jnp.float32(8),
        "batch_hash": jnp.uint32(77),
        "grad_norm_by_path": {
            "layers.mlp.up": jnp.float32(1.5),
            "layers.mlp.down": jnp.float32(jnp.nan),
        },
    }
    with pytest.raises(DivergedError) as diverged:
        log(5, 4, sums)
    log.close()
    assert (diverged.value.step, diverged.value.batch) == (5, 4)
    said = str(diverged.value)
    assert "batch 4, batch_hash 77" in said
    assert "gradients not finite: layers.mlp.down)" in said
    # It is written down before it stops the run.
    (line,) = metrics_file.read_metrics(tmp_path)
    assert line["step"] == 5 and line["grad_norm/layers.mlp.up"] == 1.5
