"""Which metrics are measured: by name, those that suit the rows, and a user's own."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from research.config.run_config import DataConfig
from research.core.errors import UserError
from research.evaluate.answer_metrics import user_metric
from research.evaluate.answer_metrics.choose_metrics import (
    FOR_ALL,
    METRICS,
    choose_metrics,
)
from research.evaluate.answer_stage import AnswerStage
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.measuring.measure_choices import CHOICE_METRICS, has_choices
from research.evaluate.measuring.measure_models import AskedRows
from research.evaluate.multiple_choice import (
    Choices,
    ScoredChoices,
    chosen,
    measure_choices,
    read_choices,
)
from research.report.evaluation_page import row_facts
from research.tokenize.tokenizer_training import byte_tokenizer

PROMPT = 8  # tokens of each prompt
ROW = AnsweredRow(
    "5f", "rows.jsonl:3", "", "rows", "P", "q", "", "", "an answer", 2, 1, True
)  # fmt: skip
LONG = "a reference of more words than a short one has in these files of rows"


def rows(category, *references):
    return [replace(ROW, category=category, reference=text) for text in references]


def counts(given):
    """How many rows each chosen metric that needs a reference is measured on."""
    found = choose_metrics("auto", given)
    without = {metric.name for metric in FOR_ALL}
    assert [name for name in found if name in without]
    return {
        name: sum(map(metric.applies, given))
        for name, metric in found.items()
        if name not in without
    }


def test_auto_gives_each_row_the_metrics_that_suit_it():
    given = [
        *rows("classification", "Land", "sea.", "land", "sea"),
        *rows("closed_qa", "Paris", LONG),
        *rows("Summarization", LONG, "short one"),
        *rows("brainstorming", "a short list", LONG, ""),
    ]
    assert counts(given) == {
        "exact_match": 3, "token_f1": 3, "contains": 3,
        "accuracy": 4, "macro_f1": 4, "label_named": 4,
        "rouge_l": 4, "rouge_2": 4, "chrf": 6, "bleu": 6,
    }  # fmt: skip


def test_auto_takes_references_for_labels_by_their_look():
    labels = ["yes", "no", "Yes", "No."]
    assert set(counts(rows("", *labels))) == {"accuracy", "macro_f1", "label_named"}
    # Lists of a classification row are no labels, and neither is one text.
    lists = [f"Land: {LONG} {number}" for number in range(4)]
    assert set(counts(rows("classification", *lists))) == {
        "rouge_l", "rouge_2", "chrf", "bleu"
    }  # fmt: skip
    assert "accuracy" not in counts(rows("", "yes", "yes", "yes"))
    assert "accuracy" not in counts(rows("", "a", "b", "c", "a"))


def test_auto_without_references_measures_what_needs_none():
    found = choose_metrics("auto", rows("", "", ""))
    assert list(found) == [m.name for m in FOR_ALL if not m.needs_reference]


def test_named_metrics_come_in_their_order_and_for_all_rows():
    given = rows("brainstorming", LONG, "x")
    found = choose_metrics(["rouge_l", "exact_match"], given)
    assert list(found) == ["rouge_l", "exact_match"]
    assert found["exact_match"].measure(given).scores == (0, 0)
    assert {"auto"} < {"auto", *choose_metrics(["auto", "bleu"], given)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rouge_1", r"a name in --metrics is 'rouge_1' \(did you mean 'rouge_l'\?\)"),
        ("", "a name in --metrics is ''; it must be one of exact_match"),
        ("no_such_module:f", r"cannot be imported: ModuleNotFoundError: No module nam"),
        (":f", "cannot be imported: ValueError"),
        ("math:sine", r"names no function of math \(did you mean 'sin'"),
        ("math:pi", "names no function of math"),
        ("math:", "names no function of math"),
        ("os.path:isdir", r"cannot be called with a row and an answer: too many"),
    ],
)
def test_a_metric_that_there_is_not_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        choose_metrics([name], rows("", "x"))


def test_metrics_that_the_caller_takes_besides_are_listed():
    with pytest.raises(UserError, match=r"did you mean 'choice_none'.* choice_bytes,"):
        choose_metrics(["choice_non"], rows("", "x"), CHOICE_METRICS)


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module of a user and gives the name of its function `score`."""

    def write(body, name):
        (tmp_path / f"{name}.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        return f"{name}:score"

    return write


def test_a_function_of_the_user_is_a_metric(write_module):
    name = write_module(
        "def score(row, answer):\n"
        '    """Words of the answer."""\n'
        "    return len(answer.split()) if row.reference else None\n"
        "score.higher_is_better = False\n"
        "score.unit = 'words'\n",
        "counts_words",
    )
    given = rows("", "x", "", "y")
    metric = choose_metrics([name], given)[name]
    assert (metric.unit, metric.note) == ("words", "Words of the answer.")
    assert metric.higher_is_better is False
    assert metric.measure(given).scores == (2, None, 2)


def test_a_metric_of_the_user_is_known_by_the_content_of_its_file(write_module):
    name = write_module("def score(row, answer): return 1\n", "edited")
    before = user_metric.content_of(name)
    assert user_metric.content_of(name) == before
    write_module("def score(row, answer): return 2\n", "edited")
    assert user_metric.content_of(name) != before


def test_metrics_without_any_row_are_named_below_the_table():
    metrics = {"a": {}, "mine:f": {}, "own:g": {}}
    one = {"answers": {"a": {"value": 1.0}, "mine:f": {"by_category": {}}, "own:g": {}}}
    alone = {"metrics": metrics, "models": {"tuned": one}, "data": {}}
    alone |= {"differences": []}
    assert [line.split()[0] for line in row_facts(alone)] == ["mine:f", "own:g"]
    both = alone | {
        "baseline": "base",
        "models": {"base": one, "tuned": one},
        "comparisons": {"tuned": {"a": {}, "own:g": {}}},
    }
    [line] = row_facts(both)
    assert line.startswith("mine:f has no row") and "both base and tuned" in line


def test_texts_that_are_no_labels_are_refused_before_there_are_answers():
    given = rows("", *(f"text {number}" for number in range(1001)))
    for name in ("accuracy", "macro_f1", "label_named"):
        with pytest.raises(UserError, match=r"1001 different texts.*use exact_match"):
            choose_metrics([name], given)
    assert choose_metrics(["exact_match"], given)


def test_sentences_that_all_differ_are_no_labels_and_short_or_repeated_ones_are():
    sentence = "the river has {} long and quiet bends"
    differing = rows("", sentence.format("two"), sentence.format("three"))
    with pytest.raises(UserError, match=r"2 rows are 2 different texts.*at most 5 wo"):
        choose_metrics(["accuracy"], differing)
    repeated = rows("", sentence.format("two"), sentence.format("two"), "no")
    for given in (repeated, rows("", "yes", "no", "I do not know")):
        assert choose_metrics(["accuracy"], given)


def asked_rows(folder, *lines):
    """Rows of a file, as they are asked, and the config that reads the file."""
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = []
    for number, _ in enumerate(lines, start=1):
        row = SimpleNamespace(place=f"{path.name}:{number}", id=f"row {number}")
        request = SimpleNamespace(prompt=(5,) * PROMPT)
        asked.append(SimpleNamespace(row=row, request=request))
    return AskedRows({"tuned": asked}, []), DataConfig(path=str(path))


def model_with_room_for(tokens):
    shape = SimpleNamespace(max_position=tokens)
    base = SimpleNamespace(architecture=shape, tokenizer=byte_tokenizer())
    return SimpleNamespace(name="tuned", run=SimpleNamespace(base=base))


def test_a_row_with_a_choice_that_does_not_fit_is_named_and_not_asked(tmp_path):
    short = {"question": "q", "choices": ["red", "blue"], "answer": 1}
    long = short | {"choices": ["red", "blue " * 5]}
    asked, data = asked_rows(tmp_path, short, long, short)

    def stage(tokens):
        found = SimpleNamespace(models=[model_with_room_for(tokens)])
        return AnswerStage.of(asked, ("auto",), found, data)

    assert not stage(PROMPT + 25).asked.problems
    left = stage(PROMPT + 24)
    assert left.choices.keys() == {"row 1", "row 3"}
    assert [x.row.id for x in left.asked.by_model["tuned"]] == ["row 1", "row 3"]
    [problem] = left.asked.problems
    assert problem.startswith("quiz.jsonl:2: choice 1 has 25 tokens, its prompt 8, ")
    with pytest.raises(UserError, match=r"no row can be asked.*quiz.jsonl:1: choice 1"):
        stage(PROMPT + 3)


def test_auto_scores_the_choices_of_rows_that_have_them(tmp_path, caplog):
    quiz = {"question": "q", "choices": ["red", "blue"], "answer": 1}
    asked, data = asked_rows(tmp_path, quiz, quiz)
    found = SimpleNamespace(models=[model_with_room_for(100)])
    assert AnswerStage.of(asked, ("auto",), found, data).choice_names == [
        "choice_none", "choice_bytes",
    ]  # fmt: skip
    again = AnswerStage.of(asked, ("choice_bytes", "auto"), found, data)
    assert again.choice_names == ["choice_bytes", "choice_none"]
    assert not again.metrics and len(again.choices) == 2
    assert not has_choices(*asked_rows(tmp_path, {"question": "q", "answer": "red"}))
    assert not caplog.text
    assert not has_choices(*asked_rows(tmp_path, quiz, quiz | {"answer": "green"}))
    assert "first 1 rows have choices" in caplog.text and ":2: the right" in caplog.text


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ("float('nan')", "nan"),
        ("float('inf')", "inf"),
        ("'0.5'", "'0.5'"),
        ("[1]", r"\[1\]"),
        ("10 ** 400", r"1000*\.\.\."),
        ("1j", "1j"),
        ("print", "<built-in"),
    ],
)
def test_a_result_that_is_no_finite_number_is_refused(write_module, returned, shown):
    module = f"returns_{abs(hash(returned))}"
    name = write_module(f"def score(row, answer): return {returned}\n", module)
    metric = choose_metrics([name], [ROW])[name]
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*returned {shown}.*id 5f"):
        metric.measure([ROW])


@pytest.mark.parametrize("returned", ["True", "2", "__import__('numpy').float32(0.5)"])
def test_numbers_of_all_kinds_are_taken(write_module, returned):
    module = f"number_{abs(hash(returned))}"
    name = write_module(f"def score(row, answer): return {returned}\n", module)
    assert choose_metrics([name], [ROW])[name].measure([ROW]).value in (1, 2, 0.5)


def test_a_function_that_fails_names_the_row_and_its_own_line(write_module):
    body = "def score(row, answer):\n    return 1 / len(row.context)\n"
    name = write_module(body, "divides")
    metric = choose_metrics([name], [ROW])[name]
    with pytest.raises(UserError, match=r"rows\.jsonl:3: .*ZeroDivis.*divides\.py:2\)"):
        metric.measure([replace(ROW, context="x"), ROW])


def test_an_error_of_several_lines_is_said_in_one(write_module):
    body = "def score(row, answer): raise ValueError('one\\n\\n  two')\n"
    name = write_module(body, "says_lines")
    with pytest.raises(UserError) as found:
        choose_metrics([name], [ROW])[name].measure([ROW])
    assert "ValueError: one two (" in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "body", ["def score(row, answer)\n", "raise SystemExit(3)\n", "import no_such\n"]
)
def test_a_module_that_does_not_import_is_one_sentence(write_module, body):
    name = write_module(body, f"broken_{abs(hash(body))}")
    with pytest.raises(UserError, match=f"the metric {name} cannot be imported"):
        choose_metrics([name], [ROW])


def test_a_function_says_which_direction_is_better(write_module):
    body = "def score(row, answer): raise SystemExit\nscore.higher_is_better = 'yes'\n"
    with pytest.raises(UserError, match="higher_is_better = 'yes'; it must be True"):
        choose_metrics([write_module(body, "directs")], [ROW])
    name = write_module("def score(row, answer): raise SystemExit\n", "exits")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: .*SystemExit"):
        choose_metrics([name], [ROW])[name].measure([ROW])


def test_a_slow_function_is_told_while_it_works(write_module, monkeypatch, caplog):
    monkeypatch.setattr(user_metric, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr(time, "told", caplog, raising=False)
    # The function itself waits until it has been told.
    body = (
        "import time\n"
        "def score(row, answer):\n"
        "    while 'is slow' not in time.told.text:\n"
        "        time.sleep(0.01)\n"
        "    return 1\n"
    )
    name = write_module(body, "waits")
    with caplog.at_level(logging.WARNING):
        choose_metrics([name], [ROW])[name].measure([ROW, ROW])
    assert "at row 1 of 2, rows.jsonl:3" in caplog.text
    assert "seconds in all" in caplog.text


SCORED = ScoredChoices(
    Choices("f:1", ("Yes", "No, not at all", "Ⅷ"), 1), (-3.0, -8.0, -4.0), (1, 4, 2)
)


def test_the_likeliest_choice_depends_on_the_normalisation():
    assert chosen(SCORED, "none") == 0
    # By tokens: -3, -2, -2, of which the first; by bytes: -1, -8/14, -4/3.
    assert chosen(SCORED, "tokens") == 1
    assert chosen(SCORED, "bytes") == 1
    assert measure_choices([SCORED, SCORED], "bytes").value == 1
    assert measure_choices([SCORED], "none").value == 0
    with pytest.raises(UserError, match=r"must be one of none, tokens, bytes"):
        chosen(SCORED, "byte_length")
    broken = replace(SCORED, log_probabilities=(-1.0, float("nan"), -2.0))
    with pytest.raises(UserError, match="f:1: a choice's log-probability is not a"):
        chosen(broken, "none")
    impossible = replace(SCORED, log_probabilities=(-float("inf"), -2.0, -1.0))
    assert chosen(impossible, "tokens") in (1, 2)


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"choices": ["x", "y", "z"], "answer": 2}, 2),
        ({"choices": ["x", "y", "z"], "answer": "C"}, 2),
        ({"choices": ["x", "y", "z"], "answer": "z"}, 2),
        ({"endings": ["x", "y"], "label": "1"}, 1),
        ({"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, 1),
        ({"choices": ["B", "A"], "answer": "B"}, 0),
        ({"choices": ["2", "0"], "answer": "0"}, 1),
        ({"choices": ["2", "0"], "answer": 0}, 0),
    ],
)
def test_choices_are_read_as_public_test_sets_write_them(row, right):
    assert read_choices(row, "f:1").right == right


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 0}, "f:1: the row has no column for choices"),
        ({"choices": ["x", "y"]}, "no column for the right choice"),
        ({"choices": ["x"], "answer": 0}, "at least two texts"),
        ({"choices": "xy", "answer": 0}, "at least two texts"),
        ({"choices": ["x", ""], "answer": 0}, "at least two texts"),
        (
            {"choices": ["x", "y"], "answer": 2},
            "right choice is 2; .* 0 to 1, .* A to B",
        ),
        ({"choices": ["x", "y"], "answer": -1}, "right choice is -1"),
        ({"choices": ["x", "x"], "answer": "x"}, "right choice is 'x'"),
    ],
)
def test_choices_that_cannot_be_read_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        read_choices(row, "f:1")


def test_every_metric_is_documented_with_its_direction():
    text = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    table = text.partition("| metric | unit | better |")[2].partition("\n\n")[0]
    documented = {}
    for line in table.splitlines()[2:]:
        names, _, better, _ = (cell.strip() for cell in line.strip("|").split("|"))
        for name in names.replace("`", "").split(", "):
            documented[name] = {"higher": True, "lower": False, "-": None}[better]
    assert documented == {
        name: metric.higher_is_better for name, metric in METRICS.items()
    }
    assert all(name == metric.name for name, metric in METRICS.items())
