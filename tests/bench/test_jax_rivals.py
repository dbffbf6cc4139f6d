"""The comparison with MaxText and Tunix: sides that step in turn, and its refusals."""

import os
import sys
from pathlib import Path

import pytest

from research.core.errors import UserError

BENCH = Path(__file__).resolve().parent
PROGRAM = """
import sys
sys.path.insert(0, {bench!r})
from steps_on_request import serve
print("a library prints")
losses = iter([3.0, 2.0])
serve(lambda: print("in a step") or next(losses), {{"trained": 7}})
"""


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import jax_rivals

    return jax_rivals


@pytest.fixture
def side(rivals):
    command = [sys.executable, "-c", PROGRAM.format(bench=str(BENCH))]
    side = rivals.Side("one", command, os.environ)
    yield side
    side.close()


def test_a_side_steps_when_it_is_asked_and_says_how_it_ended(side):
    assert side.about() == {"trained": 7}
    losses = []
    for _ in range(2):
        side.step()
        losses.append(side.last["loss"])
    assert losses == [3.0, 2.0] and len(side.seconds) == 2
    assert side.last["memory_gb"] > 0
    with pytest.raises(RuntimeError, match=r"(?s)one ended with 1:.*StopIteration"):
        side.step()


def test_ratios_are_of_the_steps_of_a_round(rivals):
    seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 4.0, 40.0]}
    assert rivals.ratios(seconds) == {"theirs": 2.0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rivals=torch", "--rivals-python=python"), "--rivals has torch"),
        ((), "make bench-rivals"),
        (("--rivals=peft",), "--torch-python is empty"),
    ],
)
def test_what_cannot_be_compared_is_said(rivals, flags, words):
    with pytest.raises(UserError, match=words):
        rivals.parse(flags)


def test_a_shape_that_is_none_is_said(rivals):
    assert rivals.sizes("4x256") == (4, 256)
    for text in ("4", "0x8", "4xa"):
        with pytest.raises(UserError, match=f"--shapes has {text!r}"):
            rivals.sizes(text)
