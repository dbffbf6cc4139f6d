"""Killed, stopped, hung: the real commands go on exactly, or say why not."""

import re
import signal

import pytest
from commands import EVALUATIONS, STEPS, chain
from kills import (
    SAYS_PHASES,
    SLOW_DATA,
    SLOW_DISK,
    kill_again_and_again,
    wait_for_a_save,
)
from pretraining_runs import STEP_LINE
from process_pairs import hang, start_pair
from run_results import check_equal, final_state, history

from research.core.errors import PREEMPTED, STUCK

OFTEN = ("--config.checkpoint.every=2",)


@chain
def killed(place, results):
    results("unbroken")
    flags = ("--config=config.py", "--config.run_dir=runs/killed", *OFTEN)
    return kill_again_and_again(place, flags, 4)


@chain
def terminated(place, results):
    """SIGTERM in the first step's compilation, in a save, and in the last report."""
    results("unbroken")
    flags = ("--config=config.py", "--config.run_dir=runs/terminated", *OFTEN)
    compiling = place.start("train", *flags, program=SAYS_PHASES)
    compiling.wait_for("phase compile 2")
    compiling.send(signal.SIGTERM)
    compiling = compiling.finish()
    saving = place.start("train", *flags, program=SLOW_DISK)
    wait_for_a_save(saving, place.run_dir("terminated") / "checkpoints")
    saving.send(signal.SIGTERM)
    saving = saving.finish()
    reporting = place.stop_at(flags, "step 16  held-out loss", signal.SIGTERM)
    return compiling, saving, reporting, place.run("train", *flags)


@chain
def pair(place, results):
    """SIGTERM to one of them, and to the end."""
    results("two_processes")
    running = start_pair(place, "pair", programs=dict.fromkeys((0, 1), SLOW_DATA))
    running[0].wait_for(STEP_LINE.format(7))
    running[1].send(signal.SIGTERM)
    stopped = [process.finish() for process in running]
    return stopped, [process.finish() for process in start_pair(place, "pair")]


@chain
def stuck(place, results):
    results("two_processes")
    running = start_pair(place, "stuck", programs={1: hang(what="time.sleep(1000)")})
    stuck = [process.finish() for process in running]
    return stuck, [process.finish() for process in start_pair(place, "stuck")]


@pytest.mark.soak
def test_a_run_killed_at_random_ends_as_the_unbroken_one(place, unbroken, killed):
    *kills, last = killed
    assert [x.code for x in kills] == [-signal.SIGKILL] * 4, kills[-1].err
    assert last.code == 0, last.err
    assert 1 < int(re.findall(r"step (\d+) restored", last.err)[0]) < STEPS
    for kind, steps in (("train", [*range(1, STEPS + 1)]), ("eval", EVALUATIONS)):
        assert [line["step"] for line in place.lines("killed", kind)] == steps
    check_equal(place, "killed", "unbroken")
    assert final_state(place, "killed") == final_state(place, "unbroken")
    starts = history(place, "killed")["starts"]
    assert starts[-1]["cause"] == "done"
    assert all("without a word" in start["cause"] for start in starts[:-1])


@pytest.mark.soak
def test_sigterm_in_any_phase_saves_and_asks_to_be_resumed(place, unbroken, terminated):
    compiling, saving, reporting, last = terminated
    for stopped in (compiling, saving, reporting):
        assert stopped.code == PREEMPTED, stopped.err
        assert "the same command resumes the run" in stopped.err.splitlines()[-1]
    assert "stopped after step 1," in compiling.err
    assert "step 1 restored" in saving.err
    assert last.code == 0, last.err
    check_equal(place, "terminated", "unbroken")
    causes = [start["cause"] for start in history(place, "terminated")["starts"]]
    assert causes[0] == "SIGTERM after step 1"
    assert causes[2] == "SIGTERM outside of training steps"
    assert causes[3] == "done"


@pytest.mark.soak
def test_goodput_counts_every_start(place, terminated):
    report = (place.run_dir("terminated") / "report.md").read_text()
    found = re.search(r"goodput\W+([\d.]+)% of ([\d,]+) s: (.*)", report)
    parts = dict(re.findall(r"(\w+) ([\d.]+)%", found[3]))
    assert sum(map(float, parts.values())) == pytest.approx(100, abs=1)
    assert float(parts["step"]) == pytest.approx(float(found[1]), abs=0.11)
    assert float(parts["restart"]) > float(parts["start"]), "three of four starts"


@pytest.mark.soak
def test_two_processes_agree_on_the_step_they_stop_at(place, pair):
    stopped, last = pair
    assert [process.code for process in stopped] == [PREEMPTED] * 2, stopped[0].err
    assert re.search(r"SIGTERM: stopped after step \d+,", stopped[0].err)
    assert [process.code for process in last] == [0, 0], last[0].err
    check_equal(place, "pair", "two-processes")


@pytest.mark.soak
def test_a_hung_process_ends_all_with_their_stacks(place, stuck):
    (waiting, hung), last = stuck
    assert hung.code == STUCK
    assert "process 1 has hung in phase 'step'" in hung.err
    assert "in hang" in hung.err, "the stack does not say where"
    assert waiting.code not in (0, PREEMPTED)
    assert re.search("process 0 .* in phase '(step|data|evaluate)'", waiting.err)
    assert [process.code for process in last] == [0, 0], last[0].err
    check_equal(place, "stuck", "two-processes")
