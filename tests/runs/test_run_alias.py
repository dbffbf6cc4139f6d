"""An alias stands for one checkpoint, moves to another and back, and keeps both."""

import json
import os

import pytest
from doors import run_door
from studio_place import make_run

from research.checkpoints.needed_steps import needed_steps
from research.core.errors import UserError
from research.runs.aliases import __main__ as aliases_door
from research.runs.aliases import promotions, run_alias


@pytest.fixture
def runs(tmp_path):
    """Two runs with checkpoints 2 and 4 that hold nothing but their sums."""
    for name in ("one", "two"):
        folder = make_run(tmp_path / "runs" / name, "finished")
        identity = {"run": name, "data": "rows", "base model": "x", "tokenizer": "y"}
        (folder / "identity.json").write_text(json.dumps(identity))
        for step in (2, 4):
            save(folder, step)
    return tmp_path / "runs"


def save(folder, step, edition=1):
    place = folder / "checkpoints" / str(step)
    place.mkdir(parents=True, exist_ok=True)
    (place / "sums.json").write_text(json.dumps({"sum": f"{folder.name}{edition}"}))


def command(runs, *flags):
    return run_door(
        aliases_door.main, runs.parent, "aliases", "--alias=runs/prod", *flags
    )


def shown(alias):
    return [f"{x.run}@{x.step}" for x in run_alias.history(alias)]


def test_an_alias_moves_and_returns_and_training_keeps_both_steps(runs):
    alias, one, two = runs / "prod", runs / "one", runs / "two"
    promotions.promote(alias, one, "2", by="ann")
    assert run_alias.target(alias) == (one, 2)
    assert needed_steps(one) == {2: str(alias)}
    promotions.promote(alias, two)
    assert run_alias.target(alias) == (two, 4)
    assert (needed_steps(one), needed_steps(two)) == ({2: str(alias)}, {4: str(alias)})
    promotions.promote(alias, two, "2")
    assert needed_steps(one) == {}, "only the one before is kept beside the current"
    assert needed_steps(two) == dict.fromkeys((2, 4), str(alias))
    promotions.back(alias, by="bob")
    assert run_alias.target(alias) == (two, 4)
    assert shown(alias) == ["one@2", "two@4", "two@2", "two@4"]
    assert [x.by for x in run_alias.history(alias)] == ["ann", "", "", "bob"]
    os.rename(runs, runs.with_name("moved"))
    moved = runs.with_name("moved")
    assert run_alias.target(moved / "prod") == (moved / "two", 4)


@pytest.mark.parametrize(
    "break_it, said",
    [
        (lambda runs: save(runs / "one", 2, edition=2), "saved this step again"),
        (lambda runs: os.rename(runs / "one", runs / "away"), "it is not there"),
        (lambda runs: (runs / "prod/alias.json").write_text("[]"), "cannot be used"),
        (lambda runs: os.unlink(runs / "prod" / "alias.json"), "stands for no run yet"),
    ],
)  # fmt: skip
def test_an_alias_never_stands_for_other_weights_than_were_promoted(
    runs, break_it, said
):
    promotions.promote(runs / "prod", runs / "one", "2")
    break_it(runs)
    with pytest.raises(UserError, match=said):
        run_alias.target(runs / "prod")


def test_what_is_no_alias_stays_as_it_is(runs):
    (runs / "file").write_text("mine")
    for name in ("two", "file"):
        with pytest.raises(UserError, match="is something else already"):
            promotions.promote(runs / name, runs / "one")
    assert (runs / "file").read_text() == "mine"
    with pytest.raises(UserError, match="is no run directory"):
        promotions.promote(runs / "prod", runs)
    with pytest.raises(UserError, match="3"):
        promotions.promote(runs / "prod", runs / "one", "3")
    assert not (runs / "prod").exists()


def test_the_command_moves_an_alias_and_prints_its_history(runs):
    for flags in (["--run=runs/one@2"], ["--run=runs/two"], ["--back"], []):
        found = command(runs, *flags)
        assert found.returncode == 0, found.stderr
    lines = [line.split()[1] for line in found.stdout.splitlines()]
    assert lines == ["one@2", "two@4", "one@2"]
    wrong = command(runs, "--back", "--run=runs/one")
    assert wrong.returncode == 2 and "--run=RUN@STEP or --back" in wrong.stderr
