"""The logic of `make bench-guard`; its processes are played by small programs."""

import contextlib
import subprocess
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent
FAKE = """
import os, pathlib, sys
log = pathlib.Path(os.environ["GUARD_LOG"])
name, seconds = pathlib.Path("name").read_text(), pathlib.Path("seconds").read_text()
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


def test_both_sides_take_their_steps_in_turn(guard, folders):
    found = guard.compare(folders / "n", folders / "o", "lora", 6)
    assert found == pytest.approx([1.2] * 6)
    assert (folders / "log").read_text() == "noonnoonnoon"


def test_a_side_that_fails_says_why(guard, folders):
    (folders / "o" / "seconds").unlink()
    with pytest.raises(SystemExit, match=r"lora in .*/o ended with 1:[\s\S]*No such"):
        guard.compare(folders / "n", folders / "o", "lora", 6)


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
    line, found = guard.judge("lora", ratios, 0.05)
    assert found is slower
    assert line.startswith("lora: ") and ("SLOWER" in line) is slower


def test_the_interval_is_that_of_order_statistics(guard):
    """A table of the sign test has ranks 6 and 15 for 20 values, 1 and 6 for six."""
    assert guard.interval(range(1, 21)) == (6, 15)
    assert guard.interval(range(1, 7)) == (1, 6)
    with pytest.raises(ValueError, match="at least 6"):
        guard.interval(range(5))


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


@pytest.mark.parametrize("slower", [True, False])
def test_the_exit_code_says_whether_a_job_is_slower(
    guard, folders, monkeypatch, capsys, slower
):
    (folders / "o" / "seconds").write_text("1.0" if slower else "1.2")
    monkeypatch.setattr(guard, "ROOT", folders / "n")
    monkeypatch.setattr(guard, "git", lambda *words, **_: "abc")
    monkeypatch.setattr(
        guard, "checked_out", lambda commit: contextlib.nullcontext(folders / "o")
    )
    assert guard.main(["--against=abc", "--jobs=lora", "--rounds=6"]) == int(slower)
    assert len(capsys.readouterr().out.splitlines()) == (
        1 + (guard.ATTEMPTS if slower else 1)
    )


def test_a_job_that_is_slower_once_alone_passes(guard, folders, monkeypatch):
    other = contextlib.nullcontext(folders / "o")
    monkeypatch.setattr(guard, "git", lambda *words, **_: "abc")
    monkeypatch.setattr(guard, "checked_out", lambda commit: other)
    found = iter([[1.5] * 6, [1.0] * 6])
    monkeypatch.setattr(guard, "compare", lambda *_: next(found))
    assert guard.main(["--against=abc", "--jobs=lora", "--rounds=6"]) == 0
