"""Answers to a file of prompts: complete, in order, and continued after a kill."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import re
import types
from pathlib import Path

import pytest

from research.core.errors import SaveError, UserError
from research.engine.requests import Piece, Sampling
from research.generate import answer_file as module
from research.generate.answer_file import answer_file
from research.generate.asked_model import AskedModel
from research.generate.prompt_file import read_prompts
from research.report import progress_view
from research.tasks.pretraining import PlainFormat
from research.tokenize.tokenizer_training import byte_tokenizer

CONTEXT = 40


class Letters:
    stop_ids = frozenset()

    def encode_prompt(self, turns, context=""):
        return [ord(x) for x in " ".join([context, *(t.text for t in turns)]).strip()]


class Echo:
    """An engine that repeats prompts; an answer is only known when it is read."""

    def __init__(self, before="", dies_at=None):
        self.before, self.dies_at, self.asked = before, dies_at, []
        self.decoders = types.SimpleNamespace(longest=CONTEXT)

    @contextlib.contextmanager
    def engine(self, slots, tokens, prefix_bytes):
        self.slots, self.tokens = slots, tokens
        yield self

    def submit(self, request):
        self.asked.append(request)
        return self._answer(request, len(self.asked))

    def _answer(self, request, number):
        if number == self.dies_at:
            raise KeyboardInterrupt
        text = f"{self.before}{request.sampling.seed}:"
        text += "".join(map(chr, request.prompt))
        yield Piece(text[:3], (1,))
        yield Piece(text[3:], (2, 3), finish="stop")


GREEDY = Sampling(max_new_tokens=5)


def model(*names, sampling=GREEDY, **changes):
    engines = {name: Echo(f"{name}-" if names else "") for name in names or ("model",)}
    return AskedModel(Letters(), engines, sampling, name="m", **changes)


def lines(out):
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len({x.pop("settings") for x in found}) <= 1
    return found


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("one \n\n  two\nthree\nfour\nfive\n")
    return path


def test_answers_come_in_the_order_of_the_prompts(prompts, tmp_path):
    out = tmp_path / "made" / "out.jsonl"
    asked = model()
    assert answer_file(asked, prompts, out, "", slots=2) == 0
    said = ["0:one", "1:  two", "2:three", "3:four", "4:five"]
    texts = ["one ", "  two", "three", "four", "five"]
    assert lines(out) == [
        {"line": n, "prompt": p, "answer": s.replace(":  ", ":"), "finish": "stop"}
        for n, p, s in zip((1, 3, 4, 5, 6), texts, said, strict=True)
    ]
    # Room for the longest prompt with its answer.
    engine = asked.generators["model"]
    assert engine.slots == 2 and engine.tokens == len("three") + 5


def test_a_killed_start_is_continued_and_gives_the_same_file(prompts, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer_file(model(), prompts, whole, "")
    for dies_at in (1, 3, 5):
        killed = model()
        killed.generators["model"].dies_at = dies_at
        with pytest.raises(KeyboardInterrupt):
            answer_file(killed, prompts, out, "", slots=1)
        assert len(lines(out)) == dies_at - 1
        with out.open("ab") as file:
            file.write(b'{"line": 9, "prompt": "to')  # A torn line.
        again = model()
        assert answer_file(again, prompts, out, "") == 0
        assert out.read_bytes() == whole.read_bytes()
        assert len(again.generators["model"].asked) == 5 - (dies_at - 1)
        out.unlink()


def test_a_complete_file_asks_nothing(prompts, tmp_path, caplog):
    out = tmp_path / "out.jsonl"
    answer_file(model(), prompts, out, "")
    before, again = out.read_bytes(), model()
    with caplog.at_level(logging.INFO):
        answer_file(again, prompts, out, "")
    assert out.read_bytes() == before and not again.generators["model"].asked
    assert "has the answers to all 5 prompts" in caplog.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda: model(sampling=Sampling(temperature=1.0)), "other flags"),
        (lambda: model(stop=("x",)), "other flags"),
        (lambda: model("base", "tuned"), "other flags"),
    ],
)
def test_other_settings_do_not_continue_a_file(prompts, tmp_path, changed, said):
    out = tmp_path / "out.jsonl"
    answer_file(model(), prompts, out, "")
    before = out.read_bytes()
    with pytest.raises(UserError, match=rf"out.jsonl:1 .*{said}.*another --out"):
        answer_file(changed(), prompts, out, "")
    with pytest.raises(UserError, match=r"out.jsonl:1 .*other flags"):
        answer_file(model(), prompts, out, "some context")
    prompts.write_text(prompts.read_text().replace("three", "THREE"))
    with pytest.raises(UserError, match=r"out.jsonl:3 answers another prompt"):
        answer_file(model(), prompts, out, "")
    assert out.read_bytes() == before


def test_a_file_of_something_else_stays_as_it_is(prompts, tmp_path):
    for content in (b'{"a": 1}\n', b"notes\n", b"[]\n"):
        out = tmp_path / "out.jsonl"
        out.write_bytes(content)
        with pytest.raises(UserError, match=r"out.jsonl:1 is no line of this command"):
            answer_file(model(), prompts, out, "")
        assert out.read_bytes() == content


def test_two_starts_do_not_write_one_file(prompts, tmp_path):
    with open(tmp_path / "out.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another start"):
            answer_file(model(), prompts, tmp_path / "out.jsonl", "")


def test_several_answers_and_models_have_names_and_seeds(prompts, tmp_path):
    prompts.write_text("a\nb\n")
    answer_file(model(), prompts, tmp_path / "n.jsonl", "", count=2)
    first, second = lines(tmp_path / "n.jsonl")
    assert first["answers"] == ["0:a", "1:a"] and second["answers"] == ["2:b", "3:b"]
    assert first["finish"] == ["stop", "stop"] and "answer" not in first
    answer_file(model("base", "tuned"), prompts, tmp_path / "two.jsonl", "in")
    assert lines(tmp_path / "two.jsonl")[1] == {
        "line": 2,
        "prompt": "b",
        "base": "base-1:in b",
        "tuned": "tuned-1:in b",
        "finish": {"base": "stop", "tuned": "stop"},
    }


ROWS = [
    ('{"id": 7, "prompt": "a", "context": "ctx"}', ""),
    ('{"messages": [{"role": "user", "content": "b"}]}', ""),
    ('{"prompt": "x"', "not a JSON object"),
    ('{"text": "x"}', "no column prompt or messages"),
    ('{"prompt": "x", "messages": []}', "prompt and messages"),
    ('{"prompt": 3}', "prompt is 3, not str"),
    ('{"prompt": " "}', "prompt is empty"),
    ('{"messages": []}', "messages is empty"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\] lacks content"),
    ('{"messages": [{"role": "me", "content": "x"}]}', "'me' is no role"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "last message"),
    ('{"prompt": "x", "context": 1}', "context is 1"),
    ('{"prompt": "x", "tools": [{}]}', "it has tools"),
    ('{"prompt": "' + "x" * 40 + '"}', "40 tokens"),
    ('{"prompt": "\\ud800"}', "not UTF-8"),
]


def test_a_bad_line_is_named_and_leaves_the_others(tmp_path, caplog):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(row for row, _ in ROWS) + "\n")
    for _ in range(2):  # Also the start that finds all written.
        assert answer_file(model(), path, out, "") == len(ROWS) - 2
    found = lines(out)
    assert found[0]["answer"] == "0:ctx a" and found[0]["id"] == 7
    assert found[1]["answer"] == "1:b" and found[1]["messages"][0]["content"] == "b"
    for number, (_, said) in list(enumerate(ROWS, start=1))[2:]:
        line = found[number - 1]
        assert line["line"] == number and "answer" not in line
        assert line["error"].startswith(f"in.jsonl:{number}: ")
        assert re.search(said, line["error"])
        assert line["error"] in caplog.text


def test_a_text_file_may_hold_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(b"caf\xe9\nok\n")
    assert answer_file(model(), path, tmp_path / "out.jsonl", "") == 1
    bad, good = lines(tmp_path / "out.jsonl")
    assert "not UTF-8" in bad["error"] and good["answer"] == "1:ok"


def test_a_file_that_cannot_be_written_is_one_sentence(prompts, tmp_path, monkeypatch):
    for out in (tmp_path, Path("/dev/full")):
        with pytest.raises(UserError, match=r"--out=.* is no file"):
            answer_file(model(), prompts, out, "")
    with pytest.raises(UserError, match=r"--out=.* cannot be written: "):
        answer_file(model(), prompts, prompts / "below", "")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(SaveError, match=r"No space left.*the same command continues"):
        answer_file(model(), prompts, tmp_path / "out.jsonl", "")


def test_a_model_that_completes_text_takes_no_conversation(tmp_path):
    row = {"messages": [{"role": "user", "content": x} for x in "ab"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + '\n{"prompt": "a"}\n')
    plain = dataclasses.replace(model(), prompts=PlainFormat(byte_tokenizer()))
    assert answer_file(plain, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "") == 1
    bad, good = lines(tmp_path / "out.jsonl")
    assert "2 messages, and this model completes" in bad["error"] and "answer" in good


def test_without_prompts_nothing_is_answered(tmp_path):
    (tmp_path / "in.txt").write_text("\n \n")
    with pytest.raises(UserError, match="has no prompt"):
        answer_file(model(), tmp_path / "in.txt", tmp_path / "out.jsonl", "")
    with pytest.raises(UserError, match="does not exist"):
        next(read_prompts(tmp_path / "absent.txt"))


def test_progress_tells_the_time_left(prompts, tmp_path, monkeypatch, caplog):
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(progress_view.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        answer_file(model(), prompts, tmp_path / "out.jsonl", "")
    told = [x for x in caplog.messages if "ETA" in x]
    assert told[0] == "1 of 5 prompts  0.1 tok/s  ETA 2:00"
    assert told[-1].startswith("5 of 5") and told[-1].endswith("ETA 0:00")
