"""`research.checkpoints`: what it lists, verifies, removes and writes."""

import re
import shutil

import pytest
from commands import STEPS, chain

from research.core.errors import DamagedError
from research.formats.base_model import open_base
from research.runs.run_directory import RunDir


@chain
def looked_at(place, results):
    """The unbroken run's checkpoints: whole, one damaged, pruned."""
    results("unbroken")
    shutil.copytree(place.run_dir("unbroken"), place.run_dir("looked-at"))

    def ask(*arguments):
        return place.run("checkpoints", "--run=runs/looked-at", *arguments)

    whole = ask("verify")
    exported = ask("export-step", "--step=best", "--out=best-model")
    newest = place.run_dir("looked-at") / "checkpoints" / str(STEPS)
    file = next((newest / "state" / "ocdbt.process_0" / "d").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return whole, exported, ask("verify"), ask(), ask("prune", "--keep_best=0"), ask()


def test_whole_checkpoints_are_listed_with_their_losses(place, looked_at):
    whole = looked_at[0]
    assert whole.code == 0, whole.err
    steps = place.saved_steps("unbroken")
    rows = re.findall(
        r"│ +(\d+) │ +([\d.]+) │ [^│]+ │ +(\S+) │ +\S+ │ verified │", whole.out
    )
    assert [int(row[0]) for row in rows] == steps
    assert all(float(row[1]) > 0.01 for row in rows)
    losses = {x["step"]: x["loss"] for x in place.lines("unbroken", "eval")}
    assert rows[-1][2] == f"{losses[STEPS]:.4f}"
    assert f"all whole: {len(steps)} checkpoints" in whole.out


def test_damage_is_named_and_the_exit_code_tells(looked_at):
    damaged, listed = looked_at[2:4]
    assert damaged.code == DamagedError.exit_code
    assert f"step {STEPS}: state/ocdbt.process_0/d/" in damaged.out
    assert "bytes have changed" in damaged.out
    assert "Traceback" not in damaged.err
    assert listed.code == 0 and re.search(rf"│ +{STEPS} .* damaged │", listed.out)


def test_prune_keeps_the_newest_whole_one(place, looked_at):
    pruned, listed = looked_at[4:]
    assert pruned.code == 0, pruned.err
    assert f"removed step {STEPS}" in pruned.out and "1 kept" in pruned.out
    (left,) = place.saved_steps("looked-at")
    assert left == max(x for x in place.saved_steps("unbroken") if x < STEPS)
    assert "1 checkpoint " in listed.out and "verified" in listed.out


def test_a_step_is_exported_as_a_model(place, looked_at):
    assert looked_at[1].code == 0, looked_at[1].err
    base = open_base(str(place.folder / "best-model"))
    assert base.architecture.embed == 64


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--run=runs",), "not a run directory"),
        (("--run=runs/unbroken", "destroy"), "'destroy'"),
        ((), "--run=RUN_DIR is missing"),
    ],
)
def test_what_it_refuses(place, unbroken, arguments, said):
    finished = place.run("checkpoints", *arguments)
    assert finished.code == 2 and said in finished.err
    assert RunDir(place.run_dir("unbroken")).is_complete
