"""Kept answers are reused, by the same code on the same devices alone."""

import dataclasses
import functools
import json
import re
import types
from contextlib import nullcontext
from pathlib import Path

import pytest

from research.config.run_config import Config
from research.core.errors import UserError
from research.engine.requests import Piece, Request, Sampling
from research.evaluate import run_evaluation
from research.evaluate.__main__ import main
from research.evaluate.measuring import ask_models, evaluated_models, measure_models
from research.runs import provenance


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str = "cpu"
    device_kind: str = "cpu"


def write_code(root, text, room="engine"):
    folder = root / "research" / room
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "some.py").write_text(text)


@pytest.mark.parametrize("changed", ["code", "jax", "environment", "backend"])
def test_answers_of_another_version_are_not_reused(tmp_path, monkeypatch, changed):
    write_code(tmp_path, "x = 1")
    parts = provenance.shared_parts
    monkeypatch.setattr(
        measure_models, "shared_parts", functools.partial(parts, tmp_path)
    )
    folder = tmp_path / "evaluations"

    def kept():
        measure_models.ask_kept("answers", {}, [], folder, 4, dict)
        return {x.name for x in (folder / "kept").iterdir()}

    [first] = kept()
    assert kept() == {first}, "the same command finds its own answers"
    for room in ("report", "evaluate/statistics"):
        write_code(tmp_path, "x = 1", room)
        assert kept() == {first}, "code that reads answers decides none"
    if changed == "code":
        write_code(tmp_path, "x = 2")
    elif changed == "jax":
        version = provenance._version
        newer = lambda name: "99.0" if name == "jax" else version(name)  # noqa: E731
        monkeypatch.setattr(provenance, "_version", newer)
    elif changed == "environment":
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    else:
        gpu = [Device("gpu", "H100")]
        monkeypatch.setattr(measure_models.jax, "local_devices", lambda: gpu)
    assert len(kept()) == 2


def test_all_code_that_measures_counts():
    research = Path(measure_models.__file__).parents[2]
    seen, left = set(), [Path(measure_models.__file__)]
    while left:
        path = left.pop()
        if not path.exists() or path in seen:
            continue
        seen.add(path)
        for name in re.findall(r"(?m)^ *from research\.(\S+) import", path.read_text()):
            found = research.joinpath(*name.split("."))
            left += [found.with_suffix(".py"), *found.glob("*.py")]
    names = {x.relative_to(research).as_posix() for x in seen}
    missing = {x for x in names if not x.startswith(measure_models.COMPUTING)}
    assert missing == {"report/progress_view.py"}
    assert len(names) > 100


def test_a_second_equal_command_is_refused_before_it_measures(tmp_path, monkeypatch):
    folder = types.SimpleNamespace(path=tmp_path)
    run = types.SimpleNamespace(config=Config(), folder=folder)
    one = types.SimpleNamespace(name="tuned", identity="5f", run=run)
    found = types.SimpleNamespace(models=[one], target=one, place=tmp_path)
    monkeypatch.setattr(evaluated_models, "find_models", lambda *_: found)
    started = []

    def evaluate(*_):
        started.append(1)
        with pytest.raises(UserError, match="by another evaluation: wait for it"):
            main(["evaluate", "--run=a", "--rows=3"])
        if len(started) == 1:
            main(["evaluate", "--run=a", "--rows=4"])
        raise KeyboardInterrupt

    monkeypatch.setattr(run_evaluation, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        main(["evaluate", "--run=a", "--rows=3"])
    assert len(started) == 2, "another command of the same run may work beside it"


MODELS = [
    types.SimpleNamespace(
        name=name, identity=name, base_in_memory=("b",), shares_base=False, step=None
    )
    for name in ("base", "tuned")
]


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Answers rows with models; `asked` has what was asked of each engine.

    An engine answers each request by its prompt, up to the number `limit`.
    """
    asked = []

    def ask(engine, requests, read):
        asked.append([*requests])
        for count, (key, request) in enumerate(requests.items()):
            if count == answer.limit:
                raise KeyboardInterrupt
            yield key, [Piece(ids=(request.prompt[0],))]

    def answer(limit=None, longest=6):
        answer.limit = limit
        sampling = Sampling(max_new_tokens=longest)
        by_row = {f"r{n}": Request((n,), sampling) for n in range(4)}
        requests = {x.name: by_row for x in MODELS}
        return measure_models.ask_kept(
            "answers", requests, MODELS, tmp_path, 2, lambda x: {"tokens": x[0].ids[0]}
        )

    stats = types.SimpleNamespace(prompt_tokens=0, new_tokens=0, slots=2)
    engine = types.SimpleNamespace(stats=lambda: stats)
    opened = types.SimpleNamespace(engine=lambda *given: nullcontext(engine))
    monkeypatch.setattr(ask_models, "open_group", lambda group: opened)
    monkeypatch.setattr(ask_models, "ask", ask)
    return types.SimpleNamespace(of=answer, asked=asked, folder=tmp_path / "kept")


def test_an_interrupted_evaluation_asks_for_what_is_missing(answers):
    with pytest.raises(KeyboardInterrupt):
        answers.of(limit=3)
    [kept] = answers.folder.iterdir()
    assert len(kept.read_text().splitlines()) == 3
    with kept.open("a") as file:
        file.write('{"model": "base", "row": "torn')
    found = answers.of()
    first, second = answers.asked
    assert second == first[3:], "no answer is made twice"
    wanted = {(x.name, f"r{n}"): {"tokens": n} for x in MODELS for n in range(4)}
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(lines) == 8
    assert found == wanted and answers.of() == wanted
    assert len(answers.asked) == 2
    answers.of(longest=7)
    assert answers.asked[2] == first, "other answers never mix with these"


def test_a_cpu_answers_rows_of_like_lengths_together_and_more_of_short_ones():
    def rows(*rooms):
        return {("m", f"r{n}"): Request((1,) * (x - 128)) for n, x in enumerate(rooms)}

    def parts(given, slots=0):
        return [
            (number, [len(x.prompt) + 128 for x in part.values()])
            for number, part in ask_models._parts(given, slots)
        ]

    short, middle, long = [300] * 63 + [512], [513] * 31 + [1024], [1100, 2000, 3000]
    every = rows(*long, *short, *middle)
    # Three fill no slots of 2,048, and are made with a longer one.
    assert parts(every) == [(4, long), (32, middle), (64, short)]
    assert parts(rows(*short[1:], *long)) == [(4, long), (64, short[1:])]
    assert parts(rows(300, *long)) == [(4, [300, *long])]
    assert parts(rows(*short[:9])) == [(16, short[:9])]
    assert parts(rows(99_000, 99_000)) == [(1, [99_000] * 2)]
    assert [number for number, _ in parts(every, slots=8)] == [8]


def test_the_time_left_follows_tokens_and_is_not_told_too_early(monkeypatch):
    monkeypatch.setattr(ask_models, "MANY_SLOTS", 2)
    work = ask_models._Work(answers=4, prompts=300)
    ended = [Piece(ids=(1,) * 10), Piece(ids=(1,) * 40, finish="stop")]
    assert work.share(ended, 210) == 0, "as many end as there are slots"
    assert work.share(ended, 300) == 300 / (300 + 4 * 50)
    assert work.share(ended, 410) == 410 / 500 and work.share(ended, 500) == 1


def test_a_line_of_something_else_is_named(answers):
    answers.of()
    [kept] = answers.folder.iterdir()
    kept.write_text("[1]\n")
    with pytest.raises(UserError, match=r"kept/answers-\w+.jsonl:1 is no line of an"):
        answers.of()
