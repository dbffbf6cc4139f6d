"""`metrics.jsonl` keeps every line that can be read, whatever became of the others."""

import json

from research.runs.metrics_file import MetricsFile, read_metrics


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
        '{"step": 2, "kind": "eval", "loss": 1}',
        "x",
    ]
    own = '{"step": 3, "kind": "own", "loss": "NaN"}'
    nan = line(4).replace("1.5", '"NaN"')
    make_metrics(tmp_path, [line(1), *odd, own, nan])
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 3, 4]
    assert "metrics.jsonl: 3 of 6 lines are no metrics" in caplog.text
