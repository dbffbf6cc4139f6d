"""A small evaluation in a run directory, as `research.evaluate` writes it."""

from research.runs.display_files import write_evaluation

DIGEST = "0123456789ab-step-3"


def judged(baseline, candidate, verdict, **more):
    """A comparison of two models in one metric."""
    change = candidate - baseline
    found = {"baseline": baseline, "candidate": candidate, "difference": change}
    found |= {"low": change - 0.125, "high": change + 0.125, "effect_size": 1.5}
    found |= {"p_value": 0.01, "adjusted_p": 0.02, "rows": 8, "clusters": 8}
    found |= {"rows_needed": 9, "differing": 8, "verdict": verdict, "by_category": {}}
    return found | more


def model_values(run, loss):
    """A model of `evaluation.json`."""
    values = {"loss": loss, "tokens": 40, "perplexity": 2.0, "bits_per_byte": 1.0}
    named = {"run": str(run), "step": 3, "identity": "f" * 64, "rows_with_loss": 8}
    groups = {"by_group": {"qa": values}, "by_source": {}, "by_length": {}}
    unit = {"loss_unit": "nats per trained token", "metrics": {}}
    return {**named, **values, **unit, **groups, "answers": {}}


def evaluation_values(run, **changes):
    """The content of `evaluation.json`: one run and its base model."""
    part = judged(0.5, 0.25, "worse", by_category=None)
    chrf = judged(0.5, 0.25, "worse", by_category={"qa": part})
    values = {
        "step": 3,
        "data": {"origin": "data/test.jsonl, 8 rows", "sha256": "0", "problem": ""},
        "config": {},
        "baseline": "base",
        "differences": [],
        "left_out": [],
        "unused": [],
        "overlap": {},
        "rows": {"evaluated": 8, "cut": 0, "without_loss": 0, "not_asked": []},
        "models": {"base": model_values(run, 3.0), "tuned": model_values(run, 2.0)},
        "metrics": {
            "chrf": {
                "unit": "0 to 100",
                "higher_is_better": True,
                "needs_reference": True,
                "note": "chrF2",
            }
        },
        "comparisons": {"tuned": {"loss": judged(3.0, 2.0, "better"), "chrf": chrf}},
        "findings": ["the perplexity of tuned falls while its answers get worse"],
        "regressions": {"tuned": [{"row": "r1", "change": -0.75}]},
        "gains": {"tuned": [{"row": "r2", "change": 0.5}]},
    }
    return values | changes


def evaluated_row(name, question, answers, category="qa"):
    """A line of `rows.jsonl`; `answers` are by model."""
    models = {
        model: {"answer": answer, "scores": {"chrf": 0.5}, "loss": 1.0}
        for model, answer in answers.items()
    }
    row = {"row": name, "place": f"data/test.jsonl:{name}", "category": category}
    more = {"question": question, "context": "", "reference": "the reference"}
    return row | more | {"models": models}


def make_evaluation(run, name=DIGEST, rows=None, **changes):
    """Writes the folder, and returns it."""
    if rows is None:
        rows = [
            evaluated_row(f"r{i}", f"question {i}", {"base": "good", "tuned": "bad"})
            for i in range(4)
        ]
    return write_evaluation(run, name, evaluation_values(run, **changes), rows, {})
