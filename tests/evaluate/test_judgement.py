"""Models are compared on the rows that all of them have, by what they share."""

import dataclasses
import json
import math

import pytest

from research.core.errors import UserError
from research.data.grouped_values import NATS_PER_TOKEN
from research.evaluate.answer_metrics.answer_metric import AnswerMetric, mean_of
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.judgement import Measurements, find_contradictions
from research.evaluate.loss_values import CommonLosses, as_json
from research.evaluate.measuring.measure_choices import CHOICE_METRICS, choice_line
from research.evaluate.multiple_choice import Choices, ScoredChoices
from research.report import evaluation_page
from research.report.markdown_text import format_table
from research.report.result_tables import compare_losses, text_columns

PAIRS = "nats per pair"


def answered(number):
    return AnsweredRow(
        f"row{number}", f"rows.jsonl:{number + 1}", "", "rows.jsonl",
        f"prompt {number}", f"question {number}", "", "reference", "answer", 3, 4, True,
    )  # fmt: skip


def common(by_model, text_bytes=None, unit=NATS_PER_TOKEN):
    """Losses from (nats, tokens) of each row by model; None: the row is too long."""
    sums = {
        name: {f"row{i}": {"loss": list(pair)} for i, pair in enumerate(rows) if pair}
        for name, rows in by_model.items()
    }
    text_bytes = text_bytes or [10] * max(map(len, by_model.values()))
    by_row = {f"row{i}": count for i, count in enumerate(text_bytes)}
    return CommonLosses.of(sums, by_row, unit)


def judge(losses, rows):
    names = losses.sums
    measured = Measurements.of(
        {name: [answered(i) for i in range(rows)] for name in names},
        losses,
        {name: {} for name in names},
        {},
    )
    return measured.comparisons(next(iter(names)))


def test_means_are_over_the_rows_that_every_model_has():
    losses = common(
        {"base": [(8, 4), (30, 3)], "a": [(4, 4), (15, 3)], "b": [(6, 4), None]}
    )
    labels = {"row0": "short", "row1": "long"}
    lines = {name: losses.group(name, labels).line() for name in losses.sums}
    header, *rows = compare_losses(lines, "category")
    assert header == [
        "category", "tokens", "loss base", "a", "b", "change a", "change b"
    ]  # fmt: skip
    assert rows[-1] == ["all", "4", "2.000", "1.000", "1.500", "-1.000", "-0.500"]
    assert [row[0] for row in rows] == ["short", "all"]
    with pytest.raises(UserError, match="no row has a loss of all of a, b"):
        common({"a": [(1, 1), None], "b": [None, (1, 1)]})
    prompts = common({"a": [None], "b": [None]})
    assert not prompts and not prompts.measure("a", ["row0"])
    assert judge(prompts, 1) == {"b": {}}


def test_losses_over_other_tokens_are_compared_by_bytes():
    """Half the tokens at the same nats is twice the loss per token, and no worse."""
    nats = [7.0 + i % 3 for i in range(12)]
    losses = common({"base": [(x, 8) for x in nats], "other": [(x, 4) for x in nats]})
    [(name, found)] = judge(losses, 12)["other"].items()
    assert name == "bits_per_byte" and found["verdict"] == "no difference shown"
    assert found["baseline"] == found["candidate"]
    assert found["candidate"] == pytest.approx(sum(nats) / math.log(2) / 120)

    labels = dict.fromkeys(losses.text_bytes, "")
    groups = {name: losses.group(name, labels) for name in losses.sums}
    assert as_json(groups["other"])["bits_per_byte"] == found["candidate"]
    header, total = compare_losses({k: x.line() for k, x in groups.items()}, "category")
    assert header[:3] == ["category", "tokens base", "other"]
    assert total[:3] == ["all", "96", "48"] and "change" not in header
    assert total[-2] == total[-1] == f"{found['candidate']:.3f}"

    better = common(
        {"base": [(x, 8) for x in nats], "other": [(x / 2, 6) for x in nats]}
    )
    [found] = judge(better, 12)["other"].values()
    assert found["verdict"] == "better"


def test_losses_that_nothing_makes_comparable_get_no_verdict():
    pairs = common({"base": [(3, 1)] * 12, "other": [(3, 2)] * 12}, unit=PAIRS)
    assert judge(pairs, 12) == {"other": {}}
    same = common({"base": [(3, 1)] * 12, "other": [(2, 1)] * 12}, unit=PAIRS)
    assert judge(same, 12)["other"]["loss"]["verdict"] == "better"
    assert "bits_per_byte" not in as_json(
        same.group("base", dict.fromkeys(same.text_bytes, ""))
    )


@pytest.mark.parametrize("loss", ["loss", "bits_per_byte"])
def test_only_a_loss_that_is_shown_to_fall_contradicts_worse_answers(loss):
    def found(loss_verdict, answer_verdict):
        values = {"baseline": 0.5, "candidate": 0.4, "difference": -0.1}
        return find_contradictions(
            {
                "tuned": {
                    loss: values | {"verdict": loss_verdict},
                    "rouge_l": values | {"verdict": answer_verdict},
                }
            }
        )

    [sentence] = found("better", "worse")
    assert "rouge_l 0.5 to 0.4" in sentence and "tuned falls" in sentence
    assert not found("no difference shown", "worse")
    assert not found("worse", "worse") and not found("better", "better")
    assert not find_contradictions({"tuned": {}})


def page_values(**more):
    model = {"rows_with_loss": 24}
    return {
        "step": 3,
        "data": {"origin": "rows.jsonl (24 rows)"},
        "rows": {"evaluated": 24, "cut": 0, "without_loss": 0, "not_asked": []},
        "baseline": "base",
        "differences": [],
        "findings": [],
        "models": {"base": dict(model), "tuned": dict(model)},
        "comparisons": {"tuned": {}},
        "metrics": {},
        "left_out": [],
        "unused": [],
        **more,
    }


def test_a_small_p_is_said_to_be_small_and_not_zero():
    for p_value, shown in ((0.0004, "< 0.001"), (0.0012, "0.001"), (1.0, "1.000")):
        each = judged("better") | {"adjusted_p": p_value}
        values = page_values(comparisons={"tuned": {"loss": each}})
        assert shown in evaluation_page.tabulate_answers(values)[1]


def test_pages_say_which_models_lack_rows_and_read_otherwise():
    values = page_values(
        rows={"evaluated": 24, "cut": 0, "without_loss": 11, "not_asked": []},
        differences=["tuned has another data.seq_len (64, not 256) than base"],
        models={"base": {"rows_with_loss": 24}, "tuned": {"rows_with_loss": 13}},
    )
    losses = common({"base": [(1, 1)], "tuned": [(2, 1)]})
    lines = {k: losses.group(k, {"row0": ""}).line() for k in losses.sums}
    pages = evaluation_page.format_pages(values, [], lines)
    for text in pages.values():
        assert "11 of 24 rows (45.8%): longer than data.seq_len of tuned" in text
        assert "another data.seq_len (64, not 256)" in text.replace("\\", "")


def judged(verdict, rows=24, differing=24):
    return {
        "baseline": 2.0, "candidate": 1.5, "difference": -0.5, "low": -0.6,
        "high": -0.4, "rows": rows, "verdict": verdict, "adjusted_p": 0.01,
        "effect_size": None, "rows_needed": None, "differing": differing,
        "clusters": rows, "by_category": {},
    }  # fmt: skip


def test_pages_begin_with_what_was_shown_on_how_many_rows(capsys):
    unshown = {f"m{i}": judged("no difference shown") for i in range(6)}
    found = {
        "loss": judged("better"), **unshown, "stopped": judged("worse", 1),
        "length_ratio": judged("lower", differing=0),
        "few": judged("too few rows to tell", 2),
    }  # fmt: skip
    values = page_values(
        comparisons={"tuned": found},
        findings=["the perplexity falls"],
        metrics={name: {"note": "", "unit": ""} for name in found if name != "loss"},
    )
    said = (
        "tuned against base, on 24 rows: better in loss (from 2.000 to 1.500); worse "
        "in stopped (from 2.000 to 1.500 on 1 row); lower in length_ratio (from 2.000 "
        "to 1.500); no difference is shown in m0, m1, m2, m3 and 2 more; "
        "there are too few rows to tell in few."
    )
    assert evaluation_page.verdict_sentences(values) == [said]
    line = {"loss": 1.0, "loss/a": 1.0, "tokens/a": 4}
    lines = {"base": line, "tuned": line}
    for text in evaluation_page.format_pages(values, [], lines).values():
        places = [
            text.index(x) for x in ("perplexity", said, "24 rows: rows", "Metrics")
        ]
        assert places == sorted(places)
        assert "the same" in text and text.count("-0.600 to -0.400") == len(found) - 1
        assert "|---|---:|---:|---:|---:|---:|---:|---:|---|" in text or "<html" in text
    evaluation_page.show_evaluation(values, lines)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"the perplexity falls {said}")

    alone = page_values(baseline="", comparisons={})
    assert "no other model" in evaluation_page.verdict_sentences(alone)[0]
    del values["rows"]
    values |= {"documents": 24, "models": {"base": {}, "tuned": {}}}
    texts = {k: x | {"bits_per_byte": 0.5} for k, x in lines.items()}
    for text in evaluation_page.format_pages(values, [], texts).values():
        assert "on 24 documents: better" in text and "source" in text
    values["models"] = {"base": {"answers": {}}, "tuned": {}}
    for text in evaluation_page.format_pages(values, [], {}).values():
        assert "Losses" not in text, "rows without a reference have none"


@pytest.mark.parametrize("unit", ["row", "document"])
def test_pages_say_that_rows_are_few_different_ones(unit):
    few = judged("too few rows to tell") | {"clusters": 1}
    values = page_values(
        comparisons={"tuned": {"loss": few | {"by_category": {"a": few}}}},
        repeats={"rows": 24, "different": 1},
    )
    if unit == "document":
        values |= {"documents": values.pop("rows")["evaluated"]}
    line = {"loss": 1.0, "loss/a": 1.0, "tokens/a": 4}
    pages = evaluation_page.format_pages(values, [], {"base": line, "tuned": line})
    for text in pages.values():
        assert f"24 {unit}s are 1 different {unit}: {unit}s that repeat" in text
        assert text.count("24 (1 different)") == 2
    values["repeats"]["different"] = 24
    assert "repeat" not in " ".join(evaluation_page.row_facts(values))


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("", ["m:long", "share"]),
        ("m:long", ["stopped", "m:long"]),
        ("loss", ["length"]),
    ],
)
def test_rows_are_ranked_by_a_users_metric_or_by_the_loss(by, names):
    """Without a metric that compares to a reference; in the metric's own unit."""

    def metric(name, unit="words", better=True, reference=False):
        score = mean_of(lambda row: len(row.answer))
        return AnswerMetric(name, unit, better, reference, "", score)

    every = {
        "m:long": metric("m:long", better=False),
        "share": metric("share", "points", reference=True),
        "stopped": metric("stopped"),
        "length": metric("length", better=None, reference=True),
    }
    losses = common({"base": [(8, 4), (8, 4)], "tuned": [(4, 4), (10, 4)]})
    answers = {"base": ["aa", "aa"], "tuned": ["aaaaa", "a"]}
    rows = {
        name: [dataclasses.replace(answered(i), answer=x) for i, x in enumerate(own)]
        for name, own in answers.items()
    }
    metrics = {name: {k: every[k] for k in names} for name in rows}
    measured = Measurements.of(rows, losses, metrics, {})
    wanted = {
        "": [(-0.01, "row1"), (0.03, "row0")],
        "m:long": [(-3, "row0"), (1, "row1")],
        "loss": [(-0.5, "row1"), (1, "row0")],
    }
    named, ranked = measured.changes("base", "tuned")
    assert (named, [(round(x, 9), row.id) for x, row in ranked]) == (by, wanted[by])
    values = {"regressions": {"tuned": [1]}, "ranked_by": {"tuned": named}}
    [(title, *_)] = evaluation_page.changed_rows(values)
    assert title == ("Worst regressions by " + by if by else "Worst regressions")


def test_pages_show_which_choice_each_model_took():
    scored = ScoredChoices(
        Choices("f:1", ("up & away", "down", "left"), 2),
        (-1.0, -math.inf, -4.0),
        (1, 1, 9),
    )
    one, both = (
        choice_line(names, scored) for names in (["choice_none"], CHOICE_METRICS)
    )
    assert json.loads(json.dumps(one, allow_nan=False)) == {
        "log_probabilities": [-1, None, -4], "chosen": {"choice_none": 0},
    }  # fmt: skip
    row = {
        "row": "r1", "place": "f:1", "category": "", "question": "?", "context": "",
        "reference": "C", "choices": scored.choices.texts, "right": 2,
        "models": {"base": one, "tuned": both | {"answer": "It is left."}},
    }  # fmt: skip
    assert evaluation_page.answer_text(row, "base") == "up & away"
    assert evaluation_page.answer_text(row, "tuned") == (
        "It is left.\nchoice_none: up & away\nchoice_tokens: left\n"
        "choice_bytes: up & away"
    )
    assert evaluation_page.expected_text(row) == "left"
    losses = {"reference": "C", "models": {"base": {"loss": 2.5}}}
    assert evaluation_page.answer_text(losses, "base") == "loss 2.500"
    values = page_values(regressions={"tuned": [{"row": "r1", "change": -1.0}]})
    pages = evaluation_page.format_pages(values, [row], {})
    assert "up & away" in pages["evaluation.md"]
    assert "up &amp; away" in pages["evaluation.html"]
    assert all("choice_tokens: left" in text for text in pages.values())


def test_words_begin_at_the_left_of_their_column_and_numbers_end_at_its_right():
    rows = [
        ["loss", "1,024", "-0.2 (-0.3 to -0.1)", "better", "-", "12.5%", "0.1 to 0.2"],
        ["stopped", "7", "the same", "-", "nan", "-", "-"],
    ]
    assert text_columns([list("abcdefg"), *rows]) == {0, 3, 4}
    assert format_table([["a", "b", "c"], ["x", "1", "y"]])[2] == "|---|---:|---|"


def test_texts_are_compared_one_by_one_and_copies_count_once():
    nats = [20.0 + i % 5 for i in range(16)]
    losses = common(
        {"base": [(x, 8) for x in nats], "tuned": [(x - 4, 8) for x in nats]}
    )
    sources = {f"row{i}": "ab"[i % 2] for i in range(16)}
    found = Measurements.of_texts(losses, sources, range(16)).comparisons("base")
    loss = found["tuned"]["loss"]
    assert loss["verdict"] == "better" and loss["clusters"] == loss["rows"] == 16
    assert loss["low"] <= loss["difference"] == -0.5 <= loss["high"]
    assert loss["by_category"].keys() == {"a", "b"}
    copies = Measurements.of_texts(losses, sources, [0] * 16).comparisons("base")
    assert copies["tuned"]["loss"]["verdict"] == "too few rows to tell"
    assert copies["tuned"]["loss"]["low"] is None
