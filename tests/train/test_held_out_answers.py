"""Answers to held-out rows: what they are worth, and how they rank steps."""

import sys
import types
import unittest.mock

import pytest

from research.config.run_config import CheckpointConfig, Config, DataConfig, EvalConfig
from research.core.errors import UserError
from research.engine.answers.full_answer import FullAnswer
from research.engine.requests import Piece, Request, Sampling
from research.evaluate.measuring.evaluated_rows import pair_answer
from research.runs.metrics_file import append_line
from research.tasks.model_answers import AnswerMeasure, HeldOutPrompt
from research.tokenize.conversation import Record, Turn
from research.tokenize.tokenizer_training import byte_tokenizer
from research.train.finish_run import contradictions
from research.train.fit_runs import _TrainingPass
from research.train.metrics.held_out_answers import HeldOutAnswers, check_best_by
from research.train.run_saver import RunSaver

TOKENIZER = byte_tokenizer()
SAID = {"Sky?": "blue", "Grass?": "green", "Snow?": "white", "Coal?": "black"}


def prompt(question):
    turns = Turn("user", question), Turn("assistant", SAID[question])
    record = Record(turns, "", "open_qa", f"rows.jsonl:{[*SAID].index(question)}")
    ids = tuple(TOKENIZER.encode_texts([question])[0])
    stops = frozenset({TOKENIZER.eos})
    request = Request(ids, Sampling(max_new_tokens=9), stops, ("ue",))
    return HeldOutPrompt(record, question, request)


class Says:
    """A model with one answer for everything, or the right ones."""

    def __init__(self, text=""):
        self.text, self.asked = text, 0

    def in_order(self, requests):
        for request in requests:
            self.asked += 1
            said = self.text or SAID[TOKENIZER.decode(request.prompt)]
            ids = tuple(TOKENIZER.encode_texts([said])[0])
            yield [Piece(said, ids), Piece(finish="stop", ids=(TOKENIZER.eos,))]


def config(prompts=2, rows=3, every=1, best_by="loss"):
    return Config(
        data=DataConfig(),
        eval=EvalConfig(prompts=prompts, answers_rows=rows, answers_every=every),
        checkpoint=CheckpointConfig(best_by=best_by),
    )


def held_out(asked=SAID, not_asked=(), **options):
    task = types.SimpleNamespace(
        asked=lambda: [prompt(x) for x in asked],
        not_asked=lambda: [*not_asked],
        groups=["open_qa"],
    )
    return HeldOutAnswers(task, TOKENIZER, config(**options))


def test_rows_are_judged_and_the_first_of_them_are_shown():
    answers = held_out()
    right, wrong = answers.answer(4, Says()), answers.answer(0, Says("zzz"))
    assert right.step == 4 and len(right.rows) == 4
    assert (
        answers.values(right)["exact_match"] == 1
        and answers.values(wrong)["exact_match"] == 0
    )
    assert answers.values(right)["stopped"] == 1
    shown = answers.side_by_side(wrong, right)
    assert [(x.prompt, x.base, x.tuned, x.reference, x.group) for x in shown] == [
        ("Sky?", "zzz", "blue", "blue", "open_qa"),
        ("Grass?", "zzz", "green", "green", "open_qa"),
    ]
    measures = {x.name: x for x in answers.compare(wrong, right)}
    found = measures["exact_match"]
    assert (found.rows, found.base, found.tuned) == (3, 0, 1)  # Not the one that shows.
    assert found.low == found.high == 1 and found.verdict
    alone = {x.name: x for x in answers.compare(None, right)}["exact_match"]
    assert (alone.base, alone.tuned, alone.low, alone.verdict) == (None, 1, None, "")
    assert [x.base for x in answers.side_by_side(None, right)] == ["", ""]


def test_more_rows_are_shown_than_judged():
    answers = held_out(prompts=4, rows=1)
    right = answers.answer(1, Says())
    assert len(answers.side_by_side(None, right)) == 4
    assert {x.rows for x in answers.compare(None, right)} <= {0, 1}


@pytest.mark.parametrize(
    ("name", "good", "bad"), [("exact_match", "", "x"), ("empty", "x", "  ")]
)
def test_a_lower_cost_is_a_better_step_whatever_the_direction(name, good, bad):
    answers = held_out(best_by=name)
    better, worse = (answers.cost(answers.answer(1, Says(x))) for x in (good, bad))
    assert better < worse
    assert held_out().cost(held_out().answer(1, Says())) is None


@pytest.mark.parametrize(("name", "ranked"), [("exact_match", -1.0), ("loss", 7.5)])
def test_a_step_is_saved_with_what_ranks_it(name, ranked):
    answers, saved, asked = held_out(best_by=name), [], []

    def is_among_best(step, cost):
        asked.append((step, cost))
        return True

    run = types.SimpleNamespace(
        config=config(best_by=name), evaluated=(4, 7.5), answers=answers,
        answered=answers.answer(4, Says()), history=unittest.mock.Mock(),
    )  # fmt: skip
    checkpointer = types.SimpleNamespace(
        is_among_best=is_among_best, wait=lambda: None, save=lambda *x: saved.append(x)
    )
    others = unittest.mock.Mock(), dict, types.SimpleNamespace(elapsed=2.0)
    saver = RunSaver(run, checkpointer, *others)
    assert saver.is_best(4) and asked == [(4, ranked)]
    assert not saver.is_best(5)  # Nothing of step 5 was measured.
    for step in (4, 5):
        saver.finish(step, "state")
    cost = -1.0 if name == "exact_match" else None
    assert [x[3:] for x in saved] == [(7.5, cost), (None, None)]


def test_a_text_that_ends_an_answer_is_no_end_by_the_model():
    answers, ids = held_out(), tuple(TOKENIZER.encode_texts(["blue"])[0])
    ends = ((ids, "stop"), (ids, "length"), ((*ids, TOKENIZER.eos), "stop"))
    pieces = [[Piece("bl", ids[:2]), Piece("", x[2:], finish=f)] for x, f in ends]
    said = [pair_answer(answers.rows[0], TOKENIZER, FullAnswer.of(x)) for x in pieces]
    assert [(x.stopped, x.new_tokens) for x in said] == [(0, 4), (0, 4), (1, 4)]


def test_the_report_warns_of_a_loss_that_falls_while_answers_get_worse(tmp_path):
    def warned(first, last, verdict):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        for step, loss in ((0, first), (2, 9.0), (4, last)):
            append_line(tmp_path, step, "eval", {"loss": loss})
        measures = [AnswerMeasure("chrf", "points", 9, 31.0, 20.0, -9, -2, verdict)]
        return contradictions(tmp_path, measures)

    [said] = warned(2.0, 1.5, "worse")
    assert "perplexity of tuned falls" in said and "chrf 31 to 20" in said
    assert not warned(2.0, 2.5, "worse") and not warned(2.0, 1.5, "better")


def test_a_metric_that_fails_costs_its_value_alone(monkeypatch):
    def late(row, answer):
        return len(answer) // (answer != "zzz")

    module = types.ModuleType("own_words")
    module.late = late
    monkeypatch.setitem(sys.modules, "own_words", module)
    name = "own_words:late"
    answers = held_out(best_by=name)
    fails, works = answers.answer(6, Says("zzz")), answers.answer(4, Says())
    assert answers.cost(works) == -14 / 3 and answers.cost(fails) is None
    assert answers.values(fails)["exact_match"] == 0 and not works.problems
    [problem] = fails.problems
    assert "rows.jsonl:0: the metric own_words:late failed on this row" in problem
    assert "(after step 6: own_words:late has no value)" in problem
    measures = {x.name: x for x in answers.compare(fails, works)}
    assert measures["exact_match"].verdict and not measures[name].verdict
    assert (measures[name].base, measures[name].tuned) == (None, 14 / 3)

    def answer(step):
        run = types.SimpleNamespace(answers=answers, warn=warned.append, answered=None)
        loop = types.SimpleNamespace(
            _active=lambda: [0], _runs=[run], _logs=[unittest.mock.Mock()],
            _generator=lambda index, state: Says("zzz"),
        )  # fmt: skip
        _TrainingPass._answer(loop, step, "state")
        return run.answered

    warned = []
    assert answer(6).step == 6 and warned == [problem]
    with pytest.raises(UserError, match=r"rows\.jsonl:0: the metric own_words:late"):
        answer(0)


def test_the_base_answers_once_for_runs_that_share_it():
    answers, base = held_out(), Says("zzz")
    found = [answers.answer_base(lambda: base) for _ in range(2)]
    assert base.asked == 4 and found[0] is found[1]
    assert held_out().answer_base(lambda: None) is None


def test_rows_that_cannot_be_asked_are_named(caplog):
    assert not held_out().not_asked and not caplog.text
    lines = [f"rows.jsonl:{i}: too long" for i in range(6)]
    assert held_out(not_asked=lines[:1]).not_asked == lines[:1]
    assert "not asked: 1 held-out row (rows.jsonl:0: too long)" in caplog.text
    held_out(not_asked=lines)
    assert "6 held-out rows (rows.jsonl:0" in caplog.text
    assert "rows.jsonl:3: too long; and 2 more in answers.json)" in caplog.text


def test_a_task_without_prompts_asks_nothing():
    answers = held_out(asked=())
    assert not answers.rows and answers.metrics == {}
    assert answers.answer_base(lambda: pytest.fail("opened")) is None
    with pytest.raises(UserError, match=r"rouge_l .*no held-out row.*held_out"):
        held_out(asked=(), best_by="rouge_l")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"best_by": "rogue_l"}, "rouge_l"),
        ({"best_by": "auto"}, "name one"),
        ({"best_by": "length_ratio"}, "neither a high nor a low"),
        ({"best_by": "no_module:score"}, "no_module"),
        ({"best_by": "rouge_l", "every": 0}, "answers_every"),
        ({"best_by": "rouge_l", "rows": 0}, "answers_rows"),
    ],
)
def test_what_can_rank_no_step_is_refused(options, said):
    check_best_by(config())
    check_best_by(config(best_by="rouge_l"))
    with pytest.raises(UserError, match=said):
        check_best_by(config(**options))
