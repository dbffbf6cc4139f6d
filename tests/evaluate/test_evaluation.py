"""A whole evaluation: models answer, are compared, and a kill costs little."""

import re
import shutil

import pytest
from doors import run_door

from research.evaluate.__main__ import main
from research.evaluate.measuring import ask_models

FEW = ("--rows=5", "--max_new_tokens=6", "--metrics=chrf,stopped")


@pytest.fixture
def copies(place, unbroken):
    """Copies of a finished run beside it, which are removed in the end."""
    made = []

    def copy(name):
        made.append(place.run_dir(name))
        return shutil.copytree(place.run_dir("unbroken"), made[-1])

    yield copy
    for each in made:
        shutil.rmtree(each)


def evaluate(place, *flags):
    return run_door(main, place.folder, "evaluate", *flags)


def results(place, done):
    assert done.returncode == 0, done.stderr
    return place.folder / re.search(r"written to (\S+)", done.stdout)[1]


def contents(folder, run):
    """The files of an evaluation, in which the run has no name of its own."""
    return {x.name: x.read_bytes().replace(run, b"RUN") for x in folder.iterdir()}


@pytest.mark.usefixtures("caches_of_the_commands")
def test_an_interrupted_evaluation_continues_and_gives_the_same_bytes(
    place, copies, monkeypatch
):
    whole = results(place, evaluate(place, f"--run={copies('whole')}", *FEW))
    asked, ask = [], ask_models.ask

    def interrupted(engine, requests):
        for count, found in enumerate(ask(engine, requests), start=1):
            yield found
            if count == 3:
                raise KeyboardInterrupt

    def counted(engine, requests):
        asked.append(len(requests))
        return ask(engine, requests)

    run = copies("interrupted")
    monkeypatch.setattr(ask_models, "ask", interrupted)
    assert evaluate(place, f"--run={run}", *FEW).returncode == 130
    [kept] = (run / "evaluations/kept").glob("answers-*")
    assert len(kept.read_text().splitlines()) == 3
    with kept.open("a") as file:
        file.write('{"model": "base", "row": "torn')
    monkeypatch.setattr(ask_models, "ask", counted)
    again = results(place, evaluate(place, f"--run={run}", *FEW))
    assert asked == [2 * 5 - 3], "what was answered before is not asked again"
    assert again.name == whole.name
    assert contents(again, b"interrupted") == contents(whole, b"whole")

    # Other metrics need no new answers; other answers never mix with these.
    other = results(place, evaluate(place, f"--run={run}", *FEW[:2], "--metrics=empty"))
    assert len(asked) == 1 and other.name != whole.name
    results(place, evaluate(place, f"--run={run}", FEW[0], "--max_new_tokens=7"))
    assert asked == [7, 10]

    kept.write_text("[1]\n")
    bad = evaluate(place, f"--run={run}", *FEW)
    assert bad.returncode == 2 and "kept/answers-" in bad.stderr
    assert len(bad.stderr.splitlines()) == 1
