"""Questions to a model: typed, piped, of a run or of a model folder."""

import contextlib
import dataclasses
import io
import json
import sys
import types

import jax
import pytest
from doors import run_door
from tiny_model import make_tiny_model

from research.config.help_text import full_help, topic_help
from research.config.run_config import Config, DataConfig, TextConfig
from research.core.errors import UserError
from research.engine.requests import Piece, Sampling
from research.engine.sampling_defaults import model_sampling
from research.formats.base_model import open_base
from research.generate import asked_model
from research.generate.__main__ import GenerateFlags, main
from research.generate.asked_model import USUAL, AskedModel, Asking
from research.generate.chat import Conversation
from research.generate.separate_prompts import answer_each, piped_prompts
from research.parallel import runtime
from research.runs.answering import int8_base
from research.runs.display_files import write_findings
from research.runs.reopen import ReopenedRun
from research.tasks.findings import SYSTEM, Finding
from research.tasks.task_registry import exported_tokenizer, load_task
from research.tokenize.chat_template import ChatFormat
from research.tokenize.conversation import Turn
from research.tokenize.tokenizer_training import save_tokenizer
from research.weights.quantized.int8_weights import Int8Matrix
from research.weights.representations.low_rank import LowRank

CONTEXT = 40


class Echo:
    """A generator that repeats its prompt, which has an id for each letter."""

    def __init__(self, before=""):
        self.before, self.samplings = before, []
        self.decoders = types.SimpleNamespace(longest=CONTEXT)

    def stream(self, request):
        self.samplings.append(request.sampling)
        yield Piece(self.before)
        text = "".join(map(chr, request.prompt))
        yield Piece(text[: request.sampling.max_new_tokens], finish="length")


class Letters:
    stop_ids = frozenset()

    def encode_prompt(self, turns, context=""):
        return [ord(x) for x in " ".join([context, *(t.text for t in turns)]).strip()]


def echo(*names, before="", **changes):
    generators = {name: Echo(before) for name in names or ("model",)}
    return AskedModel(Letters(), generators, Sampling(max_new_tokens=20), **changes)


def streamed(model, text):
    return "".join(x.text for x in model.stream("model", [Turn("user", text)]))


def piped(content, monkeypatch):
    """Standard input as `main` sets it up."""
    stream = io.TextIOWrapper(
        io.BytesIO(content), encoding="utf-8", errors="surrogateescape"
    )
    monkeypatch.setattr(sys, "stdin", stream)
    return piped_prompts()


def said(act):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        result = act()
    return result, out.getvalue(), err.getvalue()


# -- prompts by themselves -----------------------------------------------------------


def test_each_line_of_a_pipe_is_a_prompt_by_itself(monkeypatch):
    prompts = piped(b"one \n\n  two\nthree", monkeypatch)
    model = echo()
    failed, out, err = said(lambda: answer_each(model, prompts, "", as_json=True))
    assert (failed, err) == (0, "")
    assert list(map(json.loads, out.splitlines())) == [
        {"line": 1, "prompt": "one ", "answer": "one", "finish": "length"},
        {"line": 3, "prompt": "  two", "answer": "two", "finish": "length"},
        {"line": 4, "prompt": "three", "answer": "three", "finish": "length"},
    ]
    assert [s.seed for s in model.generators["model"].samplings] == [0, 1, 2]


def test_the_text_form_names_line_and_model(monkeypatch):
    prompts = piped(b"one\ntwo\n", monkeypatch)
    act = lambda: answer_each(echo("base", "tuned"), prompts, "in", as_json=False)  # noqa: E731
    assert said(act)[1] == "".join(
        f"--- line {line}, {name}: {text}\nin {text}\n"
        for line, text in ((1, "one"), (2, "two"))
        for name in ("base", "tuned")
    )


@pytest.mark.parametrize("as_json", [True, False])
def test_a_prompt_that_cannot_be_asked_leaves_the_others(monkeypatch, as_json):
    bad = b"caf\xe9"
    prompts = piped(b"one\n" + bad + b"\n" + b"long" * 10 + b"\ntwo\n", monkeypatch)
    failed, out, err = said(lambda: answer_each(echo(), prompts, "", as_json=as_json))
    assert failed == 2
    not_utf8, too_long = err.splitlines()
    assert not_utf8.startswith("error: line 2: ") and "not UTF-8" in not_utf8
    assert too_long.startswith("error: line 3: the prompt has 40 tokens")
    out.encode()  # Standard output takes nothing else.
    if as_json:
        lines = list(map(json.loads, out.splitlines()))
        assert [x["line"] for x in lines] == [1, 2, 3, 4]
        assert ["answer" in x for x in lines] == [True, False, False, True]
        assert lines[1]["error"] in not_utf8
    else:
        assert out == "--- line 1: one\none\n--- line 4: two\ntwo\n"


def test_a_pipe_without_a_prompt_is_refused(monkeypatch):
    prompts = piped(b"\n  \n", monkeypatch)
    with pytest.raises(UserError, match="standard input has no prompt"):
        answer_each(echo(), prompts, "", as_json=True)


# -- the context, and how long an answer may be ---------------------------------------


def test_answers_get_the_room_that_the_context_has(caplog):
    model = echo()
    assert streamed(model, "x" * 36) == "xxxx"
    assert "room for 4 more tokens" in caplog.text
    with pytest.raises(UserError, match=r"40 tokens.*context is 40"):
        model.stream("model", [Turn("user", "x" * 40)])
    # A length that the user gives is not shortened: the engine refuses it.
    model = echo(fits_answers=False)
    streamed(model, "x" * 36)
    assert model.generators["model"].samplings[-1].max_new_tokens == 20


# -- a chat ----------------------------------------------------------------------------


def test_a_chat_goes_on_after_what_cannot_be_asked(monkeypatch):
    piped(b"a\nb\n\nc\ncaf\xe9\n" + b"x" * 40 + b"\nd\n", monkeypatch)
    failed, out, err = said(Conversation(echo(), "ctx").interact)
    assert out.splitlines() == ["ctx a", "ctx a ctx a b", "ctx c", "ctx d", ""]
    bad, long = err.splitlines()
    assert failed == 2 and bad.startswith("error: ") and "not UTF-8" in bad
    assert "context is 40" in long


@pytest.mark.parametrize("lines, code", [(b"a\n", 0), (b"a\ncaf\xe9\nb\n", 2)])
def test_a_piped_chat_that_fails_has_an_exit_code(ask, monkeypatch, lines, code):
    monkeypatch.setattr(asked_model, "open_model", lambda *flags: echo())
    done = ask("--model=m", "--chat", stdin=lines)
    assert done.returncode == code and bool(done.stderr) == bool(code)
    assert "error" not in done.stdout and "a" in done.stdout


def test_help_of_a_flag_says_what_happens_without_it():
    shown = full_help("", GenerateFlags, has_config=False)
    assert "null" not in shown and "  --system  (str)" in shown
    assert "not given: that of training; --system= sends none" in shown
    assert "default" not in topic_help("system", GenerateFlags, has_config=False)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_does_not_obey_an_answer(is_terminal, monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", out)
    Conversation(echo(before="\x1b]0;title\x07\x9b2J\u202e\r")).say("a\x1b[2J")
    shown = "\x1b]0;title\x07\x9b2J\u202e\ra\x1b[2J"
    if is_terminal:
        shown = shown.encode("unicode_escape").decode()
    assert out.getvalue() == f"{shown}\n"


# -- a model without a run, and a run -------------------------------------------------


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """`main` with some flags and standard input, on one device."""
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)

    def run(*flags, stdin=b""):
        piped(stdin, monkeypatch)
        return run_door(main, tmp_path, "generate", *flags)

    return run


def test_a_model_folder_answers_all_of_standard_input(tmp_path, ask, monkeypatch):
    make_tiny_model(tmp_path / "model")
    models, open_model = [], asked_model.open_model
    keep = lambda *given: models.append(open_model(*given)) or models[0]  # noqa: E731
    monkeypatch.setattr(asked_model, "open_model", keep)
    greedy = {"do_sample": False, "max_new_tokens": 3}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(greedy))
    flags = ("--model=model", "--jsonl")
    done = ask(*flags, "--prompt=-", stdin=b"Two\nlines\n")
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert whole["line"] == 1 and whole["prompt"] == "Two\nlines"
    [opened] = models
    assert opened.sampling == Sampling(0.0, 0.95, max_new_tokens=3)
    turns = [Turn("user", "Two\nlines")]
    assert whole["answer"] == streamed(opened, "Two\nlines")
    # Many at once give the same answers, and a torn file is continued.
    (tmp_path / "in.txt").write_text("Two\nOne more\nTwo\n")
    many = ("--model=model", "--prompts=in.txt", "--out=out.jsonl", "--slots=2")
    assert ask(*many).returncode == 0
    written = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(written[:-20])
    assert ask(*many).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == written
    answers = [json.loads(line)["answer"] for line in written.splitlines()]
    assert answers == [streamed(opened, x) for x in ("Two", "One more", "Two")]
    done = ask("--model=model", "--prompts=in.txt", "--n=2", "--stop=@")
    assert "--- line 2, answer 2: One more\n" in done.stdout
    shown = opened.generators["model"].tokenizer.decode(
        opened.prompts.encode_prompt(turns), skip_control=False
    )
    assert shown == "<|im_start|>user\nTwo\nlines<|im_end|>\n<|im_start|>assistant\n"


def test_an_export_is_asked_with_the_system_text_of_training(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    base = open_base(str(folder))
    own = base.tokenizer.decode(
        ChatFormat(base.tokenizer, "chat").encode_prompt([Turn("user", "Hi")]),
        skip_control=False,
    )
    save_tokenizer(exported_tokenizer(Config(), base, "Trained."), folder)
    for system, shown in ((None, "Trained."), ("Other.", "Other."), ("", "")):
        opened = asked_model.open_model(str(folder), Asking(system))
        ids = opened.prompts.encode_prompt([Turn("user", "Hi")])
        front = f"<|im_start|>system\n{shown}<|im_end|>\n" if shown else ""
        assert base.tokenizer.decode(ids, skip_control=False) == front + own


def test_a_model_without_a_chat_template_completes_and_says_so(tmp_path, caplog):
    folder = make_tiny_model(tmp_path / "model")
    settings = json.dumps({"eos_token": "<|im_end|>"})
    (folder / "tokenizer_config.json").write_text(settings)
    opened = asked_model.open_model(str(folder))
    assert "no chat template: it completes the prompt" in caplog.text
    ids = opened.prompts.encode_prompt([Turn("user", "def ")])
    assert opened.generators["model"].tokenizer.decode(ids) == "def "
    with pytest.raises(UserError, match=r"--system is set.*completes a text"):
        asked_model.open_model(str(folder), Asking("Be brief."))


def test_the_weights_of_a_model_or_a_run_may_be_bytes(
    place, unbroken, tmp_path, monkeypatch, caplog
):
    assert unbroken.code == 0, unbroken.err
    monkeypatch.setattr(int8_base, "mean_loss", lambda *given: 2.0)
    model = str(place.folder / "model")
    alone = asked_model.open_model(model, Asking(weights="int8"))
    assert alone.name == f"{model} int8"
    run = str(place.run_dir("unbroken"))
    both = asked_model.open_run(run, "latest", True, Asking(weights="int8"))
    found = [*alone.generators.values(), *both.generators.values()]
    leaves = [x.params["layers.mlp.up.kernel"] for x in found]
    assert [type(x) for x in leaves] == [Int8Matrix, Int8Matrix, LowRank]
    assert leaves[1] is leaves[2].base
    assert caplog.text.count("int8 weights: loss 2.0000 instead of 2.0000") == 2


@pytest.mark.parametrize(
    ("own", "of_config", "found"),
    [
        (["A", "A"], "", ["A"]),
        (["A", None], "A", ["A"]),
        (["A", None], "", []),
        (["A", "B"], "", []),
        ([None, None], "C", ["C"]),
        ([None, None], "", []),
    ],
)
def test_the_system_text_of_the_rows_is_found_if_there_is_one(
    tmp_path, own, of_config, found
):
    """Four rows each, with two held out."""
    base = open_base(str(make_tiny_model(tmp_path / "model")))
    with (tmp_path / "chats.jsonl").open("w") as file:
        for number in range(4):
            turns = [("user", f"q{number}"), ("assistant", "a")]
            if text := own[number % 2]:
                turns.insert(0, ("system", text))
            messages = [{"role": role, "content": content} for role, content in turns]
            print(json.dumps({"messages": messages}), file=file)
    path = str(tmp_path / "chats.jsonl")
    data = DataConfig(path=path, held_out=2, seq_len=64, system=of_config)
    config = Config(data=data, text=TextConfig(cache_dir=str(tmp_path / "cache")))
    findings = load_task(config, base).examine()
    assert [x.text for x in findings if x.name == SYSTEM] == found


class NoWeights(ReopenedRun):
    def generators(self, *, compare=False):
        return {}


@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize(
    ("system", "shown"),
    [(None, "Trained."), ("Other.", "Other."), ("", None)],
)
def test_the_system_text_of_training_is_that_of_asking(
    tmp_path, monkeypatch, system, shown, of_rows
):
    base = open_base(str(make_tiny_model(tmp_path / "model")))
    config = Config(data=DataConfig(system="" if of_rows else "Trained."))
    folder = types.SimpleNamespace(path=tmp_path)
    if of_rows:
        write_findings(tmp_path, [Finding("rows", "7"), Finding(SYSTEM, "Trained.")])
    run = NoWeights(folder, 0, config, base, *[None] * 5)
    monkeypatch.setattr(asked_model, "reopen", lambda *args, **options: run)
    opened = asked_model.open_run("run", asking=Asking(system))
    ids = opened.prompts.encode_prompt([Turn("user", "Hi")])
    text = base.tokenizer.decode(ids, skip_control=False)
    front = f"<|im_start|>system\n{shown}<|im_end|>\n" if shown else ""
    assert text == f"{front}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prompt=x",), "--run=RUN_DIR is missing"),
        (("--run=a", "--model=b", "--compare"), "--run, --compare needs one"),
        (("--model=b", "--step=3"), "--step needs one"),
        (("--run=a", "--chat", "--jsonl"), "--chat is a conversation"),
        (("--run=a", "--prompt=-"), "--prompt is empty"),
        (("--run=a", "--chat", "--n=2"), "it takes no --n"),
        (("--run=a", "--out=b"), "give --prompts="),
        (("--run=a", "--prompts=absent"), "--prompts=absent does not exist"),
        (("--run=a", "--prompt=b", "--prompts=c"), "drop either"),
        (("--run=a", "--stop="), "--stop is empty"),
        (("--run=a", "--n=0"), "--n is 0; it must be in 1 to 100"),
        (("--model=a",), "base model 'a' does not exist"),
        (("--model=run",), "--model=run is the folder of a run: use --run=run"),
        (("--run=a", "--temperature=-1"), "--temperature is -1.0; it must be at least"),
        (("--run=a", "--top_p=x"), "--top_p"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(tmp_path, ask, flags, said):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    done = ask(*flags)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize(("prompt", "warns"), [("in.txt", True), ("in", False)])
def test_a_prompt_that_is_the_name_of_a_file_is_warned_of(tmp_path, ask, prompt, warns):
    (tmp_path / "in.txt").write_text("One")
    done = ask("--model=absent", f"--prompt={prompt}")
    assert (f"--prompts={prompt} answers its lines" in done.stderr) == warns


# -- how tokens are chosen -------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "expected", "unused"),
    [
        ({}, USUAL, []),
        # Without do_sample the likeliest token is taken.
        (
            {"temperature": 0.6, "top_k": 20},
            dataclasses.replace(USUAL, top_k=20),
            [],
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
            Sampling(0.6, 0.9, 20, max_new_tokens=256),
            [],
        ),
        (
            {"do_sample": True, "top_k": 0, "min_p": 0.1, "typical_p": 0.5},
            Sampling(1.0, 1.0, 0, 0.1, max_new_tokens=256),
            ["typical_p=0.5"],
        ),
        (
            {"do_sample": True, "max_new_tokens": 7, "min_p": 0},
            Sampling(1.0, 1.0, 50, max_new_tokens=7),  # The 50 of transformers.
            [],
        ),
        (
            {"repetition_penalty": 1.1},
            dataclasses.replace(USUAL, repetition_penalty=1.1),
            [],
        ),
        ({"repetition_penalty": 1.0, "eos_token_id": [1, 2]}, USUAL, []),
    ],
)
def test_a_model_says_how_its_tokens_are_chosen(generation, expected, unused):
    assert model_sampling(generation, USUAL) == (expected, unused)


@pytest.mark.parametrize(
    ("field", "value"),
    [("do_sample", 1), ("temperature", "hot"), ("temperature", -1), ("top_p", 1.5),
     ("max_new_tokens", 0.5), ("top_k", -1), ("min_p", 2),
     ("repetition_penalty", 0)],
)  # fmt: skip
def test_odd_settings_of_a_model_are_one_sentence(field, value):
    with pytest.raises(UserError, match=rf"generation_config.json.*{field}"):
        model_sampling({"do_sample": True, field: value}, USUAL)
