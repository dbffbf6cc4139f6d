"""Schemas, values, files and splits that people have, and what the rows become."""

import bz2
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from research.config import saved_config
from research.config.data_knobs import ColumnsConfig, DataConfig
from research.config.run_config import Config
from research.core.errors import UserError
from research.data.instructions.instruction_dataset import _told_apart
from research.data.instructions.row_columns import to_record
from research.data.instructions.row_selection import content_key, find_rows, load_rows
from research.data.row_readers import BadRowError, Reading, read_located
from research.tokenize.conversation import Turn


def chat(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False) if t]


def said(row, **columns):
    record = to_record(row, ColumnsConfig(**columns), "rows:1")
    return [record.context, *(turn.text for turn in record.turns)]


def load(path, **changes):
    return load_rows(DataConfig(path=str(path), **changes), 0)


def as_jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
NULLS = {"instruction": None, "response": None, "messages": None, "output": None}
SCHEMAS = {
    "null chat": ({"instruction": "q", "response": "a", "messages": None}, "q a"),
    "null pair": ({**NULLS, "messages": chat("q", "a")}, "q a"),
    "NaN pair": (
        {"response": float("nan"), "instruction": "x", "messages": chat("q", "a")},
        "q a",
    ),
    "chat and answer": ({"messages": chat("q", "a"), "response": "z"}, "q a"),
    "chat and pair": (
        {"messages": chat("q", "a"), "instruction": "x", "response": "z"},
        "x z",
    ),
    "ShareGPT": ({"conversations": SHAREGPT}, "q a"),
    "Alpaca": ({"instruction": "q", "input": "c", "output": "a"}, "c q a"),
    "Alpaca without input": ({"instruction": "q", "output": "a"}, "q a"),
    "prompt": ({"prompt": "q", "completion": "a"}, "q a"),
    "prompt of chat": (
        {"prompt": chat("q"), "completion": [{"role": "assistant", "content": "a"}]},
        "q a",
    ),
    "index of a table": ({"": "7", "prompt": "q", "completion": "a"}, "q a"),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": PARTS},
                {"role": "assistant", "content": "a"},
            ]
        },
        "ab a",
    ),
    "system": ({"system": "s", "instruction": "q", "response": "a"}, "s q a"),
    "system beside chat": ({"system": "s", "messages": chat("q", "a")}, "s q a"),
    "tool": (
        {
            "messages": [
                *chat("q", "call"),
                {"role": "tool", "content": "t"},
                {"role": "assistant", "content": "a"},
            ]
        },
        "q call t a",
    ),
    "numbers": ({"instruction": 1, "response": 2.5}, "1 2.5"),
    "bytes": ({"instruction": b"q", "response": "é".encode()}, "q é"),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_found_in_each_row(name):
    row, expected = SCHEMAS[name]
    assert " ".join(filter(None, said(row))) == expected


def test_a_chat_column_that_is_named_wins(tmp_path):
    row = {"instruction": "x", "response": "y", "talk": chat("q", "a")}
    assert said(row) == ["", "x", "y"]
    assert said(row, messages="talk") == ["", "q", "a"]
    path = tmp_path / "rows.jsonl"
    path.write_text(as_jsonl(row, {"talk": chat("q", "b")}))
    columns = ColumnsConfig(messages="talk", ignored=("instruction",))
    rows = load(path, columns=columns)
    assert rows.schemas == {"talk": 2} and list(rows.unused) == ["response"]


@pytest.mark.parametrize("knob", ["messages", "instruction", "response"])
def test_a_column_that_is_not_there_is_named_by_the_knob_that_was_set(knob):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"messages": messages} if knob == "messages" else {"instruction": "q"}
    columns = ColumnsConfig(**{knob: "conversations"})
    said = rf"no column 'conversations' for config\.data\.columns\.{knob}"
    with pytest.raises(BadRowError, match=said):
        to_record(row, columns, "rows:1")


def test_an_answer_of_weight_0_is_not_trained():
    messages = chat("q", "bad", "no", "good")
    messages[1]["weight"] = 0
    record = to_record({"messages": messages}, ColumnsConfig(), "rows:1")
    assert [turn.trained for turn in record.turns] == [True, False, True, True]
    messages[3]["weight"] = 0
    with pytest.raises(BadRowError, match="weight of every answer is 0"):
        to_record({"messages": messages}, ColumnsConfig(), "rows:1")
    messages[3]["weight"] = 0.5
    with pytest.raises(BadRowError, match=r"rows:1: weight is 0\.5"):
        to_record({"messages": messages}, ColumnsConfig(), "rows:1")


def test_rows_that_differ_in_their_calls_are_not_equal(tmp_path):
    """The split keeps equal rows on one side; calls and tools are part of a row."""
    tool = {"type": "function", "function": {"name": "f"}}
    calls = [{"function": {"name": "f", "arguments": {"x": x}}} for x in (1, 2)]
    rows = [
        {"messages": [*chat("q"), {"role": "assistant", "tool_calls": [call]}], **more}
        for call in calls
        for more in ({}, {"tools": [tool]})
    ]
    keys = {content_key(to_record(r, ColumnsConfig(), "rows:1")) for r in rows * 2}
    assert len(keys) == 4


def test_numbers_and_booleans_are_text_and_that_is_said_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "q", "response": value, "category": kind}
        for value, kind in [(1, 2), (True, "x"), ("a", ["y"]), (0.5, False)]
    ]
    path.write_text(as_jsonl(*rows))
    loaded = load(path)
    assert [r.turns[-1].text for r in loaded.records()] == ["1", "true", "a", "0.5"]
    assert [r.category for r in loaded.records()] == ["2", "x", "", "false"]
    assert loaded.notes["numbers in 'response' are read as text"] == 2


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_any_arrow_type_of_text(tmp_path, kind):
    values = pyarrow.array(["é", "a"])
    if pyarrow.types.is_dictionary(kind):
        column = values.dictionary_encode()
    else:
        column = values.cast(kind)
    table = pyarrow.table({"instruction": column, "response": column})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    records = list(load(tmp_path / "rows.parquet").records())
    assert [r.turns[-1].text for r in records] == ["é", "a"]


def test_a_parquet_row_that_is_not_utf_8_is_one_bad_row(tmp_path):
    column = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"instruction": column, "response": column})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet: row 2: "):
        load(tmp_path / "rows.parquet")
    rows = load(tmp_path / "rows.parquet", bad_lines="skip")
    assert len(rows.marks) == 2 and rows.dropped == {"not UTF-8": 1}


def test_json_lines_under_another_name(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"instruction": "q", "response": str(i)} for i in range(3)]
    path.write_text("\n" + as_jsonl(*rows))
    assert [r.where for r in list(load(path).records())] == [
        f"rows.json:{i}" for i in (2, 3, 4)
    ]


def test_a_key_that_is_there_twice_costs_its_row(tmp_path):
    good = '{"instruction": "q", "response": "a"}'
    twice = '{"messages": [{"role": "user", "content": "q", "content": "p"}]}'
    for name, content in [
        ("rows.jsonl", f"{good}\n{twice}\n"),
        ("rows.json", f"[{good},\n{twice}]"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="2: an object has two keys"):
            load(tmp_path / name)
        assert load(tmp_path / name, bad_lines="skip").dropped == {"not JSON": 1}


ROWS = [{"instruction": "q", "response": x} for x in ("a\n\nb", "", "c", "")]
CSV = 'instruction,response\n\nq,"a\n\nb"\nq,\nq,c\n"q\n\nr",\n'
PLACES = {
    ".jsonl": ("\n" + as_jsonl(*ROWS), [":3", ":5"]),
    ".json": (json.dumps(ROWS), [": item 2", ": item 4"]),
    ".csv": (CSV, [":6", ":8"]),
}


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2"])
@pytest.mark.parametrize("kind", PLACES)
def test_a_dropped_row_is_named_by_the_place_where_it_begins(tmp_path, kind, ending):
    """A line of the text within, also in a compressed file; a row may have several."""
    text, places = PLACES[kind]
    path = tmp_path / f"rows{kind}{ending}"
    opened = {"": open, ".gz": gzip.open, ".bz2": bz2.open}[ending]
    with opened(path, "wb") as file:
        file.write(text.encode())
    dropped = [f"{path.name}{place}: a response is empty" for place in places]
    assert load(path).examples == dropped


def test_a_dropped_row_of_parquet_has_its_number_in_the_file(tmp_path):
    """Counted from 1 over all row groups."""
    table = pyarrow.Table.from_pylist(ROWS * 3)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=3)
    numbers = [re.match(r"rows\.parquet: row (\d+):", x)[1] for x in
               load(tmp_path / "rows.parquet").examples]  # fmt: skip
    assert numbers == ["2", "4", "6", "8", "10", "12"]


def test_rows_of_two_files_of_one_name_are_told_apart(tmp_path):
    sources = []
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "rows.jsonl"
        path.write_text(as_jsonl(*ROWS) + "no JSON\n")
        sources.append(find_rows(DataConfig(path=str(path))))
    rows, held = sources[0], _told_apart(sources[1], sources[0])
    assert next(rows.read())[0] == "rows.jsonl:1"
    places = [*held.read()]
    assert places[0][0] == "eval_path rows.jsonl:1"
    assert str(places[-1][1]).startswith("eval_path rows.jsonl:5: ")
    (tmp_path / "test" / "rows.jsonl").rename(tmp_path / "test" / "other.jsonl")
    other = find_rows(DataConfig(path=str(tmp_path / "test" / "other.jsonl")))
    assert _told_apart(other, rows) is other


BAD_CSV = {
    "stray quote": 'q,b\n"say "five" now",x\nc,d\n',
    "backslash": 'q,b\n"say \\"five\\" now","x"\nc,d\n',
    "open quote": 'q,b\n"never closed,x\nc,d\n',
    "too many": "q,b\nx,y,z\nc,d\n",
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_one_bad_row_of_csv_is_one_bad_row(tmp_path, name):
    path = tmp_path / "rows.csv"
    path.write_text(f"instruction,response\n{BAD_CSV[name]}")
    with pytest.raises(UserError, match=r"^rows\.csv:3: .*bad_lines=skip"):
        load(path)
    rows = load(path, bad_lines="skip")
    assert [r.turns[-1].text for r in rows.records()] == ["b", "d"]
    assert [r.where for r in rows.records()] == ["rows.csv:2", "rows.csv:4"]
    assert rows.dropped == {"not CSV": 1}
    # Reading again from each place gives the same.
    whole = [(str(w), str(r)) for _, w, r in read_located(path, Reading())]
    for number, (place, _, _) in enumerate(read_located(path, Reading())):
        again = read_located(path, Reading(start=place))
        assert [(str(w), str(r)) for _, w, r in again] == whole[number:]


@pytest.mark.parametrize("mark", [";", "\t", ","])
def test_the_delimiter_of_csv_is_found(tmp_path, mark):
    path = tmp_path / "rows.csv"
    path.write_text(f"instruction{mark}response\na, b; c{mark}d\n".replace(
        "a, b; c", "a" if mark in ",;" else "a, b; c"
    ))  # fmt: skip
    assert next(load(path).records()).turns[-1].text == "d"


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("twice.csv", b"response,instruction,response\na,b,c\n", "two columns"),
        ("page.jsonl", b"\n<!DOCTYPE html><html></html>", "page in HTML"),
        ("page.parquet", b"<html><body>404", "page in HTML"),
        ("page.jsonl.gz", b"<html><body>404", "page in HTML"),
        (
            "lfs.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "git lfs pull",
        ),
        ("wide.csv", "instruction,response".encode("utf-16"), "iconv"),
        ("wide.json", "[{}]".encode("utf-16-le"), "iconv"),
        ("zipped.csv", b"PK\x03\x04....", "Excel"),
        ("table.jsonl", b"PAR1....", "a parquet file"),
        ("empty.jsonl", b"", "it is empty"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(
    tmp_path, name, content, expected
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(name)}.*{expected}"):
        load(tmp_path / name)


def test_a_folder_a_pattern_and_several_paths(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "in/c.jsonl", ".hidden/d.jsonl", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(as_jsonl({"instruction": "q", "response": name}))

    def where(path):
        return [record.where for record in list(load(path).records())]

    assert where(tmp_path) == ["a.jsonl:1", "b.jsonl:1", "in/c.jsonl:1"]
    assert where(tmp_path / "?.jsonl") == ["a.jsonl:1", "b.jsonl:1"]
    several = f"{tmp_path}/in/c.jsonl,{tmp_path}/a.jsonl"
    assert where(several) == ["in/c.jsonl:1", "a.jsonl:1"]
    (tmp_path / "in/c.jsonl").write_text("oops")
    with pytest.raises(UserError, match=r"^in/c\.jsonl:1: not a JSON"):
        load(tmp_path)


def test_a_run_of_before_keeps_its_rules():
    old = json.loads(saved_config.to_json(Config()))
    old["version"] = 1
    del old["data"]["edition"], old["data"]["eval_path"]
    assert saved_config.from_json(json.dumps(old)).data.edition == 1
    strict = to_record(
        {"instruction": "q", "response": " a ", "system": "s"},
        ColumnsConfig(),
        "rows:1",
        edition=1,
    )
    assert strict.turns == (Turn("user", "q"), Turn("assistant", "a"))


def test_a_byte_that_is_not_utf8_is_named_with_a_way_to_convert_it():
    row = {
        "instruction": b"caf\xe9?".decode("utf-8", "surrogateescape"),
        "response": "a",
    }
    with pytest.raises(BadRowError, match=r"the byte 0xe9, which is not UTF-8.*iconv"):
        to_record(row, ColumnsConfig(), "rows.csv:2")
    with pytest.raises(BadRowError, match="lone surrogate"):
        to_record({**row, "instruction": "a\ud800"}, ColumnsConfig(), "rows.json:2")


def test_a_byte_of_an_array_costs_its_row_alone(tmp_path):
    path = tmp_path / "rows.json"
    good = b'{"instruction": "q", "response": "a"}'
    path.write_bytes(b"[" + good + b",\n" + good.replace(b"q", b"caf\xe9") + b"]")
    with pytest.raises(UserError, match=r"^rows\.json: item 2: .*the byte 0xe9, which"):
        load(path)
    rows = load(path, bad_lines="skip")
    assert len(rows.marks) == 1 and rows.dropped == {"not Unicode": 1}
