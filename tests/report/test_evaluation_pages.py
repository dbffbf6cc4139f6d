"""The pages of an evaluation: they show hostile text, and run none of it."""

import re

import pytest

from research.report.evaluation_page import format_pages

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>"
NUMBERS = {
    **{"baseline": 0.0, "candidate": 1.0, "difference": 1.0, "low": 0.5, "high": 1.5},
    **{"p_value": 0.01, "adjusted_p": 0.01, "effect_size": 1.0, "rows": 9},
    **{"clusters": 9, "rows_needed": 8, "differing": 9},
}


def hostile_pages(text):
    """The pages where each name and text of rows, models and files is `text`."""
    judged = NUMBERS | {"verdict": "better", "by_category": {text: NUMBERS}}
    loss = {"loss": 2.0, "loss_unit": "nats/token", "tokens/x": 4.0, "loss/x": 2.0}
    losses = {
        name: loss | {f"loss/{text}": 2.0, f"tokens/{text}": 4.0}
        for name in ("base", text)
    }
    own = {"answer": text, "new_tokens": 1, "stopped": True, "loss": 1.0, "scores": {}}
    row = dict.fromkeys(("row", "place", "category", "question", "context"), text)
    row |= {"reference": text, "models": {"base": own, text: own}}
    seen = {"exact": 1, "words": 0, "problem": text, "training_rows": 1, "rows": []}
    metric = {"unit": text, "higher_is_better": True, "needs_reference": False}
    values = {
        "step": 3,
        "data": {"origin": text, "sha256": "0", "problem": text},
        "config": {},
        "rows": {"evaluated": 1, "without_loss": 1, "not_asked": [text]},
        "left_out": [text],
        "unused": [text],
        "baseline": "base",
        "models": {
            name: {"answers": {}, "rows_with_loss": 0} for name in ("base", text)
        },
        "metrics": {text: metric | {"note": text}},
        "comparisons": {text: {text: judged, "loss": judged}},
        "overlap": {text: seen},
        "findings": [text],
        "differences": [text],
        "regressions": {text: [{"row": text, "change": -1.0}]},
        "gains": {text: [{"row": text, "change": 1.0}]},
    }
    return format_pages(values, [row], losses)


@pytest.mark.parametrize("text", [HOSTILE, f"long {HOSTILE} " * 200])
def test_no_text_of_rows_answers_categories_or_runs_becomes_markup(text):
    page = hostile_pages(text)["evaluation.html"]
    assert "<script" not in page.casefold() and "<img" not in page.casefold()
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 20
    tags = {tag.casefold() for tag in re.findall(r"<([a-z]\w*)", page)}
    plain = hostile_pages("plain " * (len(text) // 6))["evaluation.html"]
    assert tags == {tag.casefold() for tag in re.findall(r"<([a-z]\w*)", plain)}
