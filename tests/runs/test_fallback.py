"""A full disk and damaged checkpoints under the real command: on exactly, or not."""

import json
import re
import shutil

import pytest
from commands import STEPS, chain, snapshot
from run_results import check_equal, final_state
from small_states import flip_one

from research.checkpoints.checksums import find_damage
from research.core.errors import DamagedError, SaveError
from research.data.grouped_values import by_group
from research.runs.phase_timer import PHASES

pytestmark = pytest.mark.soak
# No step is saved for its held-out loss.
AT_INTERVALS = ("--config.checkpoint.keep_best=0",)

# From step 15 on no file grows over so many bytes: metrics and TensorBoard's still fit,
# arrays do not, into however many files Orbax puts them.
ROOM = 22_000
FULL_DISK = f"""
import resource, signal
from research.checkpoints.checkpointer import Checkpointer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Checkpointer.save
def save_on_a_full_disk(self, step, *arguments):
    if step >= 15:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, ({ROOM}, hard))
    return save(self, step, *arguments)
Checkpointer.save = save_on_a_full_disk
"""


@chain
def fallen_back(place, results):
    """The disk full at step 15; room, and step 10 damaged; all damaged, twice."""
    results("unbroken")
    run = place.run_dir("fallback")
    full = place.train("fallback", *AT_INTERVALS, program=FULL_DISK)
    kept = {step: find_damage(run / "checkpoints" / step) for step in names(run)}
    size = (run / "metrics.jsonl").stat().st_size
    flip_one(next((run / "checkpoints/10/state/ocdbt.process_0/d").iterdir()))
    gone_on = place.train("fallback", *AT_INTERVALS)
    state = final_state(place, "fallback")

    shutil.copytree(run, place.run_dir("lost"))
    run = place.run_dir("lost")
    (run / "complete.json").unlink()
    for step in names(run):
        (run / "checkpoints" / step / "sums.json").write_text("{}")
    before = snapshot(run, "run.json")
    lost = [place.train("lost", *AT_INTERVALS) for _ in range(2)]
    return (full, kept, size), (gone_on, state), (lost, before)


def history_of(place, run):
    return json.loads((place.run_dir(run) / "run.json").read_text())


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_full_disk_stops_the_run_and_says_at_which_step(fallen_back):
    full, kept, size = fallen_back[0]
    assert full.code == SaveError.exit_code, full.err
    last = full.err.splitlines()[-1]
    assert last.startswith("error: step 15 could not be saved: "), full.err
    assert "too large" in last and "checkpoints left: 5, 10" in last
    assert kept == {"5": [], "10": []}, "older ones damaged, or halves left behind"
    assert 0 < size < ROOM, "it was the metrics that did not fit"


def test_with_room_and_the_newest_damaged_it_ends_as_the_unbroken_run(
    place, unbroken, fallen_back
):
    gone_on, state = fallen_back[1]
    assert gone_on.code == 0, gone_on.err
    assert "checkpoint 10 is damaged and was moved to" in gone_on.err
    assert "bytes have changed" in gone_on.err and "step 5 restored" in gone_on.err
    check_equal(place, "fallback", "unbroken")
    assert state == final_state(place, "unbroken")
    (aside,) = (place.run_dir("fallback") / "damaged").iterdir()
    assert aside.name.startswith("10-")
    found = history_of(place, "fallback")
    assert [x["exit_code"] for x in found["starts"]] == [SaveError.exit_code, 0]
    assert [(x["first"], x["step"]) for x in found["starts"]] == [(0, 15), (5, 16)]
    assert any("checkpoint 10 is damaged" in x["what"] for x in found["events"])


def test_the_metrics_and_the_report_say_where_the_time_went(place, fallen_back):
    """Over all starts: the second one, and steps 6 to 15 done twice, are restart."""
    (line,) = place.lines("fallback", "goodput")
    seconds = by_group(line, "seconds")
    assert line["step"] == STEPS and seconds.keys() == {*PHASES, "restart"}
    assert sum(seconds.values()) == pytest.approx(line["total_s"], abs=0.01)
    assert line["goodput"] == pytest.approx(seconds["step"] / line["total_s"], abs=1e-4)
    first, second = history_of(place, "fallback")["starts"]
    repeated = first["seconds"]["step"] * 10 / 15
    assert seconds["restart"] == pytest.approx(
        second["seconds"]["start"] + repeated, abs=0.01
    )
    report = (place.run_dir("fallback") / "report.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| ([\d,.]+) \| [\d.]+% \|$", report, re.M))
    for name, value in rows.items():
        assert float(value.replace(",", "")) == pytest.approx(seconds[name], abs=0.051)
    assert {"start", "compile", "step", "save", "restart"} <= rows.keys()
    assert "wall time, all starts" in fallen_back[1][0].out
    for line in place.lines("fallback", "eval"):
        assert by_group(line, "seconds").keys() == set(PHASES)
        assert line["seconds/start"] > 0


def test_when_all_are_damaged_it_stops_each_time_and_overwrites_nothing(
    place, fallen_back
):
    lost, before = fallen_back[2]
    run = place.run_dir("lost")
    assert [x.code for x in lost] == [DamagedError.exit_code] * 2, lost[0].err
    for finished in lost:
        last = finished.err.splitlines()[-1]
        assert re.search("^error: .*(restore a copy|bring one back)", last)
        assert "Traceback" not in finished.err
        assert "first step begun" not in finished.err
    assert "all checkpoints in" in lost[0].err
    assert "step 16 was saved" in lost[1].err
    after = snapshot(run, "run.json")
    moved = {path.relative_to(run): data for path, data in after.items()}
    for path, data in before.items():
        top, *rest = path.relative_to(run).parts
        if top == "checkpoints":
            step = rest.pop(0)
            (aside,) = (run / "damaged").glob(f"{step}-*")
            path = aside.joinpath(*rest)
        assert moved.pop(path.relative_to(run)) == data, f"{path} was changed"
    assert not [x for x in moved if x.parts[0] != "damaged"], "something was written"
    causes = history_of(place, "lost")["starts"][-2:]
    assert all(x["cause"].startswith("DamagedError") for x in causes)
    assert all(x["exit_code"] == DamagedError.exit_code for x in causes)
