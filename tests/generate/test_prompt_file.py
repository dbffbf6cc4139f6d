"""Rows of a file as prompts: their columns are those of training, or are named."""

import csv
import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from research.config.data_knobs import ColumnsConfig
from research.config.knobs import changed
from research.config.run_config import Config
from research.config.saved_config import to_json
from research.core.errors import UserError
from research.generate import asked_model, prompt_file
from research.generate.__main__ import main
from research.generate.prompt_file import PromptColumns, read_prompts

KINDS = (".csv", ".jsonl", ".json", ".parquet", ".jsonl.gz")
ROWS = [{"question": "Why?", "passage": "It rains.", "answer": "So."}] * 2


def write(path, rows):
    """The rows in the format that the path's ending names."""
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return path


@pytest.fixture
def loaded(monkeypatch):
    """Notes that a model would be loaded, and ends the command there."""
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        raise UserError("loaded")

    monkeypatch.setattr(asked_model, "open_model", stop)
    monkeypatch.setattr(asked_model, "open_run", stop)
    return calls


def ask(*flags):
    with pytest.raises(UserError) as raised:
        main(["generate", *flags])
    return str(raised.value)


def texts(path, columns=prompt_file.USUAL):
    found = list(read_prompts(path, columns))
    assert not any(each.problem for each in found), found
    return [([turn.text for turn in x.turns], x.context.strip()) for x in found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_prompts_is_refused_before_a_model_is_loaded(
    kind, tmp_path, loaded
):
    path = write(tmp_path / f"in{kind}", ROWS)
    said = ask("--model=any", f"--prompts={path}", f"--out={tmp_path / 'out.jsonl'}")
    assert "'question', 'passage', 'answer'" in said and not loaded
    flag = said.rpartition(" ")[2]
    assert flag == "--prompt_column=question"
    # The flag that is named works.
    assert ask("--model=any", f"--prompts={path}", flag) == "loaded"
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_test_file_is_read_as_the_run_reads_its_own_rows(kind, tmp_path, loaded):
    columns = {"instruction": "question", "context": "passage", "response": "answer"}
    values = {f"data.columns.{field}": name for field, name in columns.items()}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(changed(Config(), values, "test")))
    path = write(tmp_path / f"in{kind}", ROWS)
    assert ask(f"--run={run}", f"--prompts={path}") == "loaded"
    found = texts(path, PromptColumns.of(ColumnsConfig(**columns)))
    assert found == [(["Why?"], "It rains.")] * 2
    # A file that was written for prompts stays one.
    other = write(tmp_path / f"other{kind}", [{"prompt": "Who?", "question": ""}])
    assert texts(other, PromptColumns.of(ColumnsConfig(**columns))) == [(["Who?"], "")]


ANSWERED = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "!")]


@pytest.mark.parametrize(
    "row, turns, context",
    [
        ({"instruction": "Do", "context": "c", "response": "r"}, ["Do"], "c"),
        ({"instruction": "Do", "input": "i", "output": "o"}, ["Do"], "i"),
        ({"prompt": "Do", "completion": "o"}, ["Do"], ""),
        (
            {"messages": [{"role": r, "content": c} for r, c in ANSWERED]},
            ["Hi", "Hello", "Bye"],
            "",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}], "system": "Be"},
            ["Be", "Hi"],
            "",
        ),
        ({"prompt": "  two\n", "system": "Be"}, ["Be", "  two\n"], ""),
    ],
)
def test_rows_of_training_are_prompts_without_their_answers(
    row, turns, context, tmp_path
):
    assert texts(write(tmp_path / "in.jsonl", [row])) == [(turns, context)]


def test_columns_that_were_named_count_alone(tmp_path, loaded, caplog):
    rows = [{"prompt": "a", "quest": "b", "passage": "c"}]
    path = write(tmp_path / "in.jsonl", rows)
    flags = ("--model=any", f"--prompts={path}")
    assert "no column qest (did you mean 'quest'?)" in ask(
        *flags, "--prompt_column=qest"
    )
    assert "filled in no row" in ask(*flags, "--context_column=pasage")
    assert not loaded
    with caplog.at_level(logging.WARNING):
        assert ask(*flags, "--prompt_column=quest") == "loaded"
    assert "column 'passage' is filled, as in in.jsonl:1" in caplog.text
    assert "--context_column=passage adds it" in caplog.text
    caplog.clear()
    flags += ("--prompt_column=quest", "--context_column=passage")
    assert ask(*flags) == "loaded" and "passage" not in caplog.text
    assert texts(path, PromptColumns.of(ColumnsConfig(), "quest")) == [(["b"], "")]


def test_rows_that_would_be_read_as_lines_are_refused(tmp_path, loaded):
    (tmp_path / "in.tsv").write_text("prompt\tid\nHi\t1\n")
    assert "rename it to end in .csv" in ask(
        "--model=any", f"--prompts={tmp_path / 'in.tsv'}"
    )
    write(tmp_path / "rows.parquet", ROWS).rename(tmp_path / "in.txt")
    assert "is a parquet file" in ask("--model=any", f"--prompts={tmp_path / 'in.txt'}")
    assert not loaded
