"""`metrics.jsonl` keeps every line that can be read, whatever became of the others."""

import json

from research.runs.metrics_file import MetricsFile, read_metrics


def make_metrics(folder, lines):
    text = "".join(f"{line}\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(text.encode("latin-1"))


def line(step):
    return json.dumps({"step": step, "kind": "train", "loss": 1.5})


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


def test_a_line_that_a_kill_has_torn_is_no_damage(tmp_path, caplog):
    make_metrics(tmp_path, [line(1), line(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')
    MetricsFile(tmp_path, 2).close()
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2]
    assert not caplog.text and not [*tmp_path.glob("metrics.jsonl.*")]
