"""The logic of `make bench-guard`; its processes are played by small programs."""

import contextlib
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import PATIENCE

BENCH = Path(__file__).resolve().parent
FAKE = """
import os, pathlib, sys
log = pathlib.Path(os.environ["GUARD_LOG"])
name, seconds = pathlib.Path("name").read_text(), pathlib.Path("seconds").read_text()
if name == "hangs":
    sys.stdin.read()
print(0, flush=True)
for _ in sys.stdin:
    with log.open("a") as file:
        file.write(name)
    print(seconds, flush=True)
"""


@pytest.fixture(scope="module")
def guard():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import bench_guard

        yield bench_guard


@pytest.fixture
def folders(guard, monkeypatch, tmp_path):
    """The working tree `n` and the other commit `o`, of which the first is slower."""
    (tmp_path / "side.py").write_text(FAKE)
    monkeypatch.setattr(guard, "SIDE", tmp_path / "side.py")
    monkeypatch.setenv("GUARD_LOG", str(tmp_path / "log"))
    for name, seconds in (("n", 1.2), ("o", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
        (tmp_path / name / "seconds").write_text(str(seconds))
    return tmp_path


@pytest.fixture
def compare(guard, folders):
    def call(*flags, seconds=2 * PATIENCE):
        options = guard.parse(flags)
        over = time.monotonic() + seconds
        return guard.compare(folders / "n", folders / "o", "lora", options, over)

    return call


def test_both_sides_take_their_steps_in_turn(compare, folders):
    assert compare().found == pytest.approx([1.2] * 8)
    assert (folders / "log").read_text() == "noon" * 4


def test_a_side_that_fails_says_why(guard, compare, folders):
    (folders / "o" / "seconds").unlink()
    with pytest.raises(guard.GuardError, match=r"/o ended with 1:[\s\S]*No such"):
        compare()


def test_a_job_ends_when_its_time_is_over(compare, folders):
    (folders / "o" / "name").write_text("hangs")
    verdict = compare(seconds=0.2)
    assert not verdict.measured and not verdict.slower
    assert str(verdict) == "NOT MEASURED: 0 rounds are too few"


def test_one_measurement_never_says_slower(guard, monkeypatch):
    """The second one had no time."""
    slow, none = (guard.Verdict(found, 0.05, 0.05) for found in ([1.2] * 9, []))
    verdicts = iter([slow, none])
    monkeypatch.setattr(guard, "compare", lambda *_: next(verdicts))
    assert slow.slower and guard.judge(None, None, "lora", None, 0.0) is none


def test_time_is_left_to_measure_again(guard, monkeypatch):
    ends, begun = [], time.monotonic()
    slow = guard.Verdict([1.2] * 9, 0.05, 0.05)
    monkeypatch.setattr(guard, "compare", lambda *args: ends.append(args[-1]) or slow)
    guard.judge(None, None, "lora", None, begun + 1000)
    first, second = ends
    assert first < begun + 520 and second == begun + 1000


@pytest.mark.parametrize(
    ("ratios", "rounds"),
    [
        ([1.0] * 64, 8),
        ([1.2] * 64, 8),
        ([0.9, 1.2, 0.9, *[1.2] * 61], 16),
        ([0.9, 1.1] * 32, 64),
    ],
    ids=["as fast", "slower", "certain later", "never certain"],
)
def test_a_job_ends_when_it_is_decided(guard, compare, monkeypatch, ratios, rounds):
    monkeypatch.setattr(guard, "ratios", lambda *_: iter(ratios))
    assert len(compare().found) == rounds


def test_several_looks_are_as_certain_as_one(guard, compare, monkeypatch):
    monkeypatch.setattr(guard, "ratios", lambda *_: iter([0.9, 1.1] * 32))
    for rounds, looks in ((64, [8, 16, 32, 64]), (40, [8, 16, 32, 40]), (8, [8])):
        verdict = compare(f"--rounds={rounds}")
        assert verdict.missed == pytest.approx(0.05 / len(looks))
        assert len(verdict.found) == rounds and "not for certain" in str(verdict)


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ([1.10] * 20, True),
        ([1.04] * 20, False),
        ([0.5] * 20, False),
        ([0.9] * 8 + [1.2] * 12, False),
        ([1.01] * 8 + [1.2] * 12, True),
    ],
    ids=["slower", "within the limit", "faster", "not certain", "certain"],
)
def test_slower_is_what_is_above_the_limit_for_certain(guard, ratios, slower):
    verdict = guard.Verdict(ratios, 0.05, 0.05)
    assert verdict.slower is slower
    assert ("SLOWER" in str(verdict)) is slower


def test_the_interval_is_that_of_order_statistics(guard):
    """A table of the sign test has ranks 6 and 15 for 20 values, 1 and 6 for six."""
    assert guard.interval(range(1, 21), 0.05) == (6, 15)
    assert guard.interval(range(1, 7), 0.05) == (1, 6)
    assert guard.interval(range(5), 0.05) == (-math.inf, math.inf)


def test_the_other_commit_is_the_one_that_changes_came_after(guard, tmp_path):
    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=no")
        done = subprocess.run(
            ["git", *name, *words], cwd=tmp_path, check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    def commit(text):
        (tmp_path / "file").write_text(text)
        git("add", "file")
        git("commit", "-m", text)
        return git("rev-parse", "HEAD")

    git("init", "-b", "main")
    first, second = commit("1"), commit("2")
    assert guard.other_commit(tmp_path) == first
    git("checkout", "-b", "own")
    commit("3")
    last = commit("4")
    assert guard.other_commit(tmp_path) == second
    (tmp_path / "file").write_text("5")
    assert guard.other_commit(tmp_path) == last


@pytest.mark.parametrize(
    ("other", "minutes", "code", "said"),
    [("1.0", 9, 1, "SLOWER"), ("1.2", 9, 0, "ok"), ("1.2", 0, 3, "NOT MEASURED")],
)
def test_the_exit_code_says_whether_a_job_is_slower(
    guard, folders, monkeypatch, capsys, other, minutes, code, said
):
    (folders / "o" / "seconds").write_text(other)
    monkeypatch.setattr(guard, "ROOT", folders / "n")
    monkeypatch.setattr(guard, "git", lambda *words, **_: "abc")
    monkeypatch.setattr(
        guard, "checked_out", lambda commit: contextlib.nullcontext(folders / "o")
    )
    flags = ["--against=abc", "--jobs=lora", f"--minutes={minutes}"]
    assert guard.main(flags) == code
    printed = capsys.readouterr()
    assert [said in line for line in printed.out.splitlines()] == [False, True]
    assert ("it is measured again" in printed.err) is (code == 1)


def test_a_job_that_is_slower_once_alone_passes(guard, folders, monkeypatch):
    other = contextlib.nullcontext(folders / "o")
    monkeypatch.setattr(guard, "git", lambda *words, **_: "abc")
    monkeypatch.setattr(guard, "checked_out", lambda commit: other)
    found = iter([guard.Verdict([x] * 8, 0.05, 0.05) for x in (1.5, 1.0)])
    monkeypatch.setattr(guard, "compare", lambda *_: next(found))
    assert guard.main(["--against=abc", "--jobs=lora"]) == 0


@pytest.mark.parametrize("flag", ["--against=no-such-commit", "--jobs=sleep"])
def test_what_cannot_be_compared_is_no_slower_job(flag):
    command = [sys.executable, BENCH / "bench_guard.py", flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and flag.partition("=")[2] in done.stderr
    assert "Traceback" not in done.stderr
