"""What takes too long for every day: 50 kills, and pairs that fail in every way."""

import json
import re
import signal

import pytest
from commands import chain
from kills import kill_again_and_again
from test_end_to_end import final_state
from test_pretraining import STEP_LINE, pretrain
from test_survival import HANG, OFTEN, PAIR, check_equal, start_pair

from research.errors import PREEMPTED, SaveError

pytestmark = pytest.mark.soak


@chain
def killed_often(place, results):
    results("unbroken")
    flags = ("--config=config.py", "--config.run_dir=runs/often", *OFTEN)
    return kill_again_and_again(place, flags, 25, seed=1)


# So many steps that a run is not done before its last kill.
LONG = (
    "--config.steps=150",
    "--config.eval.every=50",
    "--config.eval.samples_every=50",
)


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
""" + HANG.format(
    what="resource.setrlimit(resource.RLIMIT_FSIZE, "
    "(1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
)


@chain
def pairs(place, results):
    """How two processes end when the second one fails, by what it does."""
    results("two_processes")
    ended = {}
    for name, what in (("raises", "1 / 0"), ("sleeps", "time.sleep(1000)")):
        running = start_pair(place, name, programs={1: HANG.format(what=what)})
        ended[name] = [process.finish() for process in running]
    for name, number in (("stops", signal.SIGSTOP), ("dies", signal.SIGKILL)):
        running = start_pair(place, name)
        running[0].wait_for(STEP_LINE.format(4))
        running[1].send(number)
        first = running[0].finish()
        running[1].send(signal.SIGCONT)
        ended[name] = [first, running[1].finish()]
    running = start_pair(place, "full", programs={1: FULL_DISK})
    ended["fills"] = [process.finish() for process in running]
    return ended


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


def check_kills(ended):
    *kills, last = ended
    survived = [x for x in kills if x.code == -signal.SIGKILL]
    assert {x.code for x in kills} <= {-signal.SIGKILL, 0}, kills[-1].err
    assert last.code == 0, last.err
    assert len(survived) >= 0.8 * len(kills)
    return len(survived)


def test_fine_tuning_survives_25_kills(place, unbroken, killed_often):
    print("kills survived:", check_kills(killed_often))
    check_equal(place, "often", "unbroken")
    assert final_state(place, "often") == final_state(place, "unbroken")


def test_pretraining_survives_25_kills(
    place, long_pretrained, pretraining_killed_often
):
    assert long_pretrained.code == 0, long_pretrained.err
    print("kills survived:", check_kills(pretraining_killed_often))
    check_equal(place, "pretraining-often", "long")


@pytest.mark.parametrize("how", ["raises", "sleeps", "stops", "dies", "fills"])
def test_a_failing_process_ends_the_other(pairs, how):
    first, second = pairs[how]
    assert first.code not in (0, PREEMPTED), first.err
    assert re.search("process 0 .* in phase ", first.err), first.err
    assert second.code != 0
    assert first.seconds < 120


def test_a_dead_process_ends_the_other_with_its_stacks(pairs):
    survivor, dead = pairs["dies"]
    assert dead.code == -signal.SIGKILL
    assert "fitting.py" in survivor.err, "no stack"


def test_a_full_disk_at_one_process_is_said_at_once(place, pairs):
    _, full = pairs["fills"]
    assert full.code == SaveError.exit_code, full.err
    assert re.search(r"step \d+ could not be saved: .*too large", full.err), full.err


def test_ctrl_c_at_one_process_stops_both_at_one_step(place, interrupted_pair):
    stopped, last = interrupted_pair
    assert [x.code for x in stopped] == [PREEMPTED] * 2, stopped[0].err
    assert [x.code for x in last] == [0, 0], last[0].err
    check_equal(place, "interrupted", "two-processes")


def test_the_launcher_starts_again_what_has_lost_a_process(place, launched):
    """All of them, and the run ends as if nothing had happened."""
    assert launched.code == 0, launched.err
    assert launched.err.count("once more") == 1
    assert re.search(r"step \d+ restored", launched.err)
    check_equal(place, "launched", "two-processes")
    starts = json.loads((place.run_dir("launched") / "run.json").read_text())["starts"]
    assert len(starts) == 2 and starts[-1]["cause"] == "done"
