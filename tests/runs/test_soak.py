"""Long tests: 50 kills, and pairs of processes that fail in every way."""

import collections
import json
import re
import signal
import time

import jax
import numpy as np
import pytest
from commands import chain
from kills import kill_again_and_again, phase_of, torn
from pretraining_runs import STEP_LINE, pretrain
from process_pairs import LIMIT, PAIR, hang, start_pair
from run_results import check_equal, hashes, numbers, saved_state

from research.core.errors import PREEMPTED, SaveError

pytestmark = pytest.mark.soak


# So many steps that no run is done before its last kill, and each phase is met.
STEPS = 150
LONG = (
    f"--config.steps={STEPS}",
    "--config.checkpoint.every=2",
    "--config.eval.every=6",
    "--config.eval.samples_every=50",
)


@chain
def long(place, results):
    results("unbroken")
    return place.train("long-tuned", *LONG)


@chain
def killed_often(place, results):
    results("unbroken")
    flags = ("--config=config.py", "--config.run_dir=runs/often", *LONG)
    return kill_again_and_again(place, flags, 25, seed=1)


@chain
def long_pretrained(place, results):
    results("pretrained")
    return pretrain(place, "long", *LONG)


@chain
def pretraining_killed_often(place, results):
    results("pretrained")
    flags = ("--config=pretrain.py", "--config.run_dir=runs/pretraining-often", *LONG)
    return kill_again_and_again(place, flags, 25, seed=2)


# From the second batch on no file of this process grows: its disk is full.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
""" + hang(
    what="resource.setrlimit(resource.RLIMIT_FSIZE, "
    "(1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
)


# The others end at most this late beyond the watchdog's limit: it looks every 1.5 s,
# and they write down their stacks on a busy machine.
SLACK = 20


@chain
def pairs(place, results):
    """How two processes end when one fails, by what it does, and what comes after.

    By name: how each ended, how many seconds after step 1 or the signal, and how the
    same command ended.
    """
    results("two_processes")
    ended = {}
    programs = {
        "raises": hang(what="1 / 0"),
        "sleeps": hang(what="time.sleep(1000)"),
        "fills": FULL_DISK,
    }
    for name, program in programs.items():
        running = start_pair(place, name, programs={1: program})
        running[0].wait_for(STEP_LINE.format(1))
        ended[name] = ends(place, name, running, time.monotonic())
    signals = [("stops", 1, signal.SIGSTOP), ("dies", 1, signal.SIGKILL)]
    for name, rank, number in [*signals, ("leader-dies", 0, signal.SIGKILL)]:
        running = start_pair(place, name)
        running[0].wait_for(STEP_LINE.format(4))
        running[rank].send(number)
        ended[name] = ends(place, name, running, time.monotonic(), failed=rank)
    return ended


def ends(place, name, running, begun, failed=1):
    survivor = running[1 - failed].finish()
    seconds = time.monotonic() - begun
    running[failed].send(signal.SIGCONT)
    stopped = [running[failed].finish(), survivor]
    both = stopped if failed == 0 else stopped[::-1]
    return both, seconds, [process.finish() for process in start_pair(place, name)]


# A difference that only the second of two processes gets, and the words that name it.
OTHERS = {
    "knob": (
        "sys.argv.append('--config.optim.learning_rate=1e-4')",
        "config.optim.learning_rate: 0.01 and 0.0001",
    ),
    "data": (
        """
import pathlib, shutil
shutil.copytree('code', 'elsewhere/code', dirs_exist_ok=True)
for name in ('words.jsonl', 'pretrain.py'):
    shutil.copy(name, 'elsewhere')
pathlib.Path('elsewhere/words.jsonl').write_text('{"text": "other words"}\\n' * 99)
runs = pathlib.Path('elsewhere/runs')
runs.exists() or runs.symlink_to(pathlib.Path('runs').absolute())
os.chdir('elsewhere')
""",
        "data: ",
    ),
    "folder": (
        """
import shutil
shutil.copytree('.', 'other', ignore=shutil.ignore_patterns('runs', 'other'))
os.chdir('other')
from research.train import prepare_runs
prepare_runs.DISK_PATIENCE = 1.0
""",
        "is not the folder that process 0 trains in",
    ),
    "error": (
        """
from research.core.errors import UserError
from research.tasks import task_registry
def fail(*_):
    raise UserError("no such disk")
task_registry.load_task = fail
""",
        "no such disk",
    ),
}


@chain
def unequal_pairs(place, results):
    """Two processes that were not given the same."""
    results("two_processes")
    return {
        name: [
            process.finish()
            for process in start_pair(
                place,
                f"unequal-{name}",
                "--config.text.tokenizer=byte",
                programs={1: f"import os, sys\n{program}"},
            )
        ]
        for name, (program, _) in OTHERS.items()
    }


@chain
def interrupted_pair(place, results):
    results("two_processes")
    running = start_pair(place, "interrupted")
    running[0].wait_for(STEP_LINE.format(4))
    running[0].send(signal.SIGINT)
    stopped = [process.finish() for process in running]
    return stopped, [process.finish() for process in start_pair(place, "interrupted")]


@chain
def launched(place, results):
    """Started by the launcher; the second of its processes is killed."""
    results("two_processes")
    training = (*PAIR, "--config.run_dir=runs/launched")
    launcher = place.start_launch(("local", "--processes=2"), training, devices=2)
    launcher.wait_for(STEP_LINE.format(7))
    launcher.children()[1].kill()
    return launcher.finish()


def check_kills(place, run, ended):
    """All ended as they should, left nothing half written, and met every phase."""
    *kills, last = ended
    assert last.code == 0, last.err
    assert torn(place.run_dir(run) / "checkpoints") == []
    met = collections.Counter(map(phase_of, kills))
    begun = [re.search(r"step (\d+) restored", x.err) for x in (*kills, last)]
    went_on = sorted({int(found[1]) for found in begun if found})
    assert len(went_on) > 5, "too few starts resumed from a checkpoint"
    assert went_on[-1] < STEPS, "the last kill came when all was done"
    print(f"{run}: {len(kills)} kills survived:", dict(met), "resumed at", went_on)
    assert len(kills) == 25
    assert {"start", "compile", "data", "step", "evaluate", "save"} <= set(met)


def check_same_end(place, run, unbroken):
    assert numbers(place, run) == numbers(place, unbroken)
    assert hashes(place, run) == hashes(place, unbroken)
    ends = [saved_state(place, x, STEPS) for x in (run, unbroken)]
    one, other = ([np.asarray(x).tobytes() for x in jax.tree.leaves(e)] for e in ends)
    assert one == other and len(one) > 20


def test_fine_tuning_survives_25_kills(place, long, killed_often):
    assert long.code == 0, long.err
    check_kills(place, "often", killed_often)
    check_same_end(place, "often", "long-tuned")


def test_pretraining_survives_25_kills(
    place, long_pretrained, pretraining_killed_often
):
    assert long_pretrained.code == 0, long_pretrained.err
    check_kills(place, "pretraining-often", pretraining_killed_often)
    check_same_end(place, "pretraining-often", "long")
    exported = [
        (place.run_dir(run) / "model" / "model.safetensors").read_bytes()
        for run in ("pretraining-often", "long")
    ]
    assert exported[0] == exported[1]


@pytest.mark.parametrize("how", ["raises", "sleeps", "stops", "dies", "fills"])
def test_a_failing_process_ends_the_other_and_both_go_on(place, pairs, how):
    (first, second), seconds, last = pairs[how]
    assert first.code not in (0, PREEMPTED), first.err
    assert re.search("process 0 .* in phase ", first.err), first.err
    assert second.code != 0
    print(f"{how}: the other one has ended after {seconds:.1f} s")
    assert seconds < LIMIT + SLACK
    assert [x.code for x in last] == [0, 0], last[0].err
    check_equal(place, how, "two-processes")


def test_the_death_of_the_first_process_ends_the_other(place, pairs):
    (dead, survivor), seconds, last = pairs["leader-dies"]
    assert dead.code == -signal.SIGKILL
    assert survivor.code not in (0, PREEMPTED), survivor.err
    print(f"leader-dies: the other one has ended after {seconds:.1f} s")
    assert seconds < LIMIT + SLACK
    assert [x.code for x in last] == [0, 0], last[0].err
    check_equal(place, "leader-dies", "two-processes")


def test_a_dead_process_ends_the_other_with_its_stacks(pairs):
    (survivor, dead), _, _ = pairs["dies"]
    assert dead.code == -signal.SIGKILL
    assert "training_loop.py" in survivor.err, "no stack"


def test_a_full_disk_at_one_process_is_said_at_once(pairs):
    (_, full), _, _ = pairs["fills"]
    assert full.code == SaveError.exit_code, full.err
    assert re.search(r"step \d+ could not be saved: .*too large", full.err), full.err


@pytest.mark.parametrize("name", OTHERS)
def test_processes_that_were_given_something_else_are_refused(
    place, unequal_pairs, name
):
    for process in unequal_pairs[name]:
        assert process.code == 2, process.err
        assert OTHERS[name][1] in process.err
        assert "Traceback" not in process.err
        assert process.seconds < 60
    assert not (place.run_dir(f"unequal-{name}") / "metrics.jsonl").exists()


def test_ctrl_c_at_one_process_stops_both_at_one_step(place, interrupted_pair):
    stopped, last = interrupted_pair
    assert [x.code for x in stopped] == [PREEMPTED] * 2, stopped[0].err
    assert [x.code for x in last] == [0, 0], last[0].err
    check_equal(place, "interrupted", "two-processes")


def test_the_launcher_starts_again_what_has_lost_a_process(place, launched):
    """All of them, and the run ends as if nothing had happened."""
    assert launched.code == 0, launched.err
    assert launched.err.count("restarting") == 1
    assert re.search(r"step \d+ restored", launched.err)
    check_equal(place, "launched", "two-processes")
    starts = json.loads((place.run_dir("launched") / "run.json").read_text())["starts"]
    assert len(starts) == 2 and starts[-1]["cause"] == "done"
