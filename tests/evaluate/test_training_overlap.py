"""Test rows among training rows: equal prompts, shared runs of 13 words, any script."""

import re
import types
from unittest import mock

import pytest

from research.evaluate import training_overlap
from research.evaluate.measuring import seen_rows
from research.evaluate.training_overlap import Overlap, TrainingOverlap
from research.report.evaluation_page import row_facts

THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"
ELSEWHERE = "words of a training row that no test row has, in any order at all, ever"


def overlap(test, *training):
    finder = TrainingOverlap(test)
    for number, row in enumerate(training):
        finder.add(f"train:{number}", *row)
    return finder.found()


def test_equal_prompts_are_found_whatever_their_answers():
    test = {"a": ("What is  LoRA?", "x"), "b": ("What is QLoRA?", "x"), "c": ("", "x")}
    found = overlap(test, (ELSEWHERE,), ("what is lora", "y"), ("WHAT IS LORA", "z"))
    assert found == [Overlap("a", "exact", "train:1", "what is lora")]


def test_runs_of_thirteen_words_are_found_and_of_twelve_are_not():
    twelve = THIRTEEN.removesuffix(" thirteen")
    test = {
        "thirteen": (f"Before, {THIRTEEN}. After!", ""),
        "twelve": (f"Before {twelve}, after", ""),
        "across": (twelve, "Thirteen."),
        "short": ("thirteen", ""),
    }
    found = overlap(test, (f"{ELSEWHERE} {THIRTEEN.upper()} {ELSEWHERE}", "no"))
    assert [(each.id, each.kind, each.words) for each in found] == [
        ("thirteen", "words", THIRTEEN),
        ("across", "words", THIRTEEN),
    ]


def test_an_equal_prompt_is_named_before_a_shared_run():
    found = overlap({"a": (THIRTEEN, "x")}, (f"{THIRTEEN} x",), (THIRTEEN, "y"))
    assert [(each.kind, each.training_place) for each in found] == [
        ("exact", "train:1")
    ]


def test_other_scripts():
    chinese = "今天天气很好我们一起去公园散步吧"
    test = {"zh": (chinese, ""), "ru": ("Кот СИДИТ", ""), "accent": ("cafe\u0301", "")}
    found = overlap(test, (f"昨天他说{chinese[:13]}了",), ("кот сидит!",), ("café",))
    assert [(each.id, each.kind) for each in found] == [
        ("zh", "words"), ("ru", "exact"), ("accent", "exact")
    ]  # fmt: skip
    assert not overlap({"zh": (chinese, "")}, (chinese[:12],))


def test_runs_that_many_training_rows_have_are_boilerplate():
    test = {"a": (f"{THIRTEEN} a question", "")}
    rows = [(f"{THIRTEEN} number {number}",) for number in range(11)]
    assert len(overlap(test, *rows[:10])) == 1
    assert not overlap(test, *rows)
    # A run that occurs twice in one row is one row's.
    assert len(overlap(test, *[(f"{THIRTEEN} {THIRTEEN}",)] * 6)) == 1


def test_rows_that_share_a_run_are_all_found_in_their_order():
    test = {name: (f"{name} {THIRTEEN}", name) for name in "cab"}
    assert [each.id for each in overlap(test, (THIRTEEN,))] == ["c", "a", "b"]


def test_nothing_overlaps_with_nothing():
    assert overlap({}, ("x", "y")) == []
    assert overlap({"a": ("", ""), "b": ("!?", "")}, ("",), ("...", "")) == []
    assert overlap({"a": ("x", "y")}) == []
    assert overlap({"a": ("\ud800 x", "")}, ("\ud800 X",))[0].kind == "exact"


def test_training_rows_leave_nothing_in_memory():
    """All that grows is the first place of each run of the test rows."""
    finder = TrainingOverlap({"a": (THIRTEEN, "")})
    held = training_overlap.RUN
    for number in range(300):
        finder.add(f"train:{number}", f"{number} {THIRTEEN} {number}")
    sizes = [len(v) for v in vars(finder).values() if hasattr(v, "__len__")]
    assert max(sizes) <= held


@pytest.mark.parametrize(
    ("accepted", "now", "said"),
    [
        ({}, "a" * 64, ""),
        ({}, "b" * 64, r"the data of runs/x has changed .*sha256 a{12}, now b{12}\)"),
        ({"data": f"{'a' * 64} -> {'b' * 64}"}, "b" * 64, ""),
        ({"data": f"{'a' * 64} -> {'b' * 64}"}, "a" * 64, "has changed"),
    ],
)
def test_data_that_has_changed_since_the_training_is_said(
    monkeypatch, accepted, now, said
):
    history = types.SimpleNamespace(accepted=accepted)
    monkeypatch.setattr(seen_rows, "History", lambda *given: history)
    folder = mock.MagicMock(identity=lambda: {"data": "a" * 64})
    folder.__str__.return_value = "runs/x"
    found = seen_rows.describe_change(types.SimpleNamespace(folder=folder), now)
    assert re.search(said, found) and bool(found) == bool(said)
    # Raw text, which has no rows.
    facts = row_facts({"data": {"problem": found}, "differences": []})
    assert facts == ([found] if found else [])
