"""`metrics.jsonl` keeps every line that can be read, whatever became of the others."""

import json
import math
from pathlib import Path

from research.data.grouped_values import by_group
from research.runs.metrics_file import MetricsFile, read_metrics

KEPT = Path(__file__).parents[1] / "golden" / "kept" / "metrics.jsonl"


def make_metrics(folder, lines):
    text = "".join(f"{line}\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(text.encode("latin-1"))


def line(step):
    more = {"tokens": 9, "elapsed_s": 0.5, "memory_gb": 0.0}
    return json.dumps({"step": step, "kind": "train", "loss": 1.5, **more})


def test_a_broken_line_in_the_middle_costs_no_later_one(tmp_path, caplog):
    odd = ['{"step": 3, "ki', '{"kind": "train"}', "\xff\xfe", "[]"]
    make_metrics(tmp_path, [line(1), line(2), *odd, line(4), line(5), line(6)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    MetricsFile(tmp_path, 5).close()
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2, 4, 5]
    (copy,) = tmp_path.glob("metrics.jsonl.*")
    assert copy.read_bytes() == before
    assert "metrics.jsonl: 4 of 9 lines cannot be read" in caplog.text
    assert "(line 3, 4, 5, 6)" in caplog.text and str(copy) in caplog.text


def test_a_line_that_a_kill_has_torn_costs_no_other(tmp_path, caplog):
    make_metrics(tmp_path, [line(1), line(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')
    MetricsFile(tmp_path, 2).close()
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2]
    assert len([*tmp_path.glob("metrics.jsonl.*")]) == 1 and "1 of 3" in caplog.text


def test_lines_without_what_reports_read_are_counted_and_not_shown(tmp_path, caplog):
    odd = [
        '{"step": 2, "kind": "train"}',
        '{"step": 2, "kind": "eval", "loss": [1]}',
        "x",
    ]
    own = '{"step": 3, "kind": "own", "loss": "NaN"}'
    nan = line(4).replace("1.5", '"NaN"')
    make_metrics(tmp_path, [line(1), *odd, own, nan])
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 3, 4]
    assert "metrics.jsonl: 3 of 6 lines are no metrics" in caplog.text


def test_lines_of_an_earlier_version_are_read_as_those_of_this_one(tmp_path):
    """They nested the values by group, and held null, lists and names of numbers."""
    (tmp_path / "metrics.jsonl").write_bytes(KEPT.read_bytes())
    start, one, two, pairs, goodput = read_metrics(tmp_path)
    old = [json.loads(x) for x in KEPT.read_text().splitlines()]
    assert by_group(start, "loss") == old[0]["by_group"]
    assert by_group(start, "bits_per_byte") == old[0]["bits_by_group"]
    assert by_group(start, "tokens") == old[0]["tokens"]
    assert by_group(start, "seconds") == old[0]["seconds"]
    assert one["grad_norm/layers.mlp.up.kernel"] == 1.5 and "mfu" not in one
    assert math.isnan(one["grad_norm/layers.mlp.down.kernel"])
    assert (two["loss"], two["skipped"]) == (math.inf, 1)
    assert pairs["metrics"] == "accuracy,margin" and "margin" not in pairs
    assert by_group(pairs, "accuracy") == {"even": 1.0, "odd/far": 0.0}
    assert goodput["total_s"] == old[-1]["total_s"]


def test_a_run_that_an_earlier_version_began_has_one_form(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(KEPT.read_bytes())
    before = read_metrics(tmp_path)
    metrics = MetricsFile(tmp_path, 2)
    metrics.write(3, "train", {"loss": 1.0, "loss/words": 1.0, "mfu": None})
    metrics.close()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    fields = [(name, value) for line in lines for name, value in line.items()]
    # A field has one type, and no value holds others.
    types = {(name, type(value)) for name, value in fields}
    assert len(types) == len({name for name, _ in fields})
    assert {kind for _, kind in types} == {int, float, str}
    kept = [line for line in read_metrics(tmp_path) if line["step"] < 3]
    assert repr(kept) == repr(before), "NaN equals nothing"
