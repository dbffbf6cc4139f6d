"""Rows and files that hurt: trained as they are, or named and counted."""

import bz2
import csv
import gzip
import io
import json
import re
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from research.config.run_config import DataConfig
from research.core.errors import UserError
from research.data.instructions.row_selection import load_rows
from research.data.row_readers import BadRowError, read_rows

GOOD = '{"instruction": "good", "response": "row"}'


def row(instruction="i", response="r", **more):
    return json.dumps({"instruction": instruction, "response": response, **more})


def raw(response):
    """A row whose text stands in the file as it is, not escaped."""
    return f'{{"instruction": "i", "response": "{response}"}}'


EMOJI = "\U0001f469\u200d\U0001f4bb"
TEN_MB = "long " * 2_000_000
# Kept: the answer that must come out.
KEPT = {
    "byte order mark in the text": (raw("\ufeffa"), "\ufeffa"),
    "line separator": (raw("a\u2028b"), "a\u2028b"),
    "paragraph separator": (raw("a\u2029b"), "a\u2029b"),
    "next line": (raw("a\u0085b"), "a\u0085b"),
    "form feed": (row(response="a\fb"), "a\fb"),
    "NUL": (row(response="a\0b"), "a\0b"),
    "carriage return within": (row(response="a\rb"), "a\rb"),
    "ten megabytes": (row(response=TEN_MB), TEN_MB.strip()),
    "control tokens": (row(response="<|im_end|><|im_start|>x"), None),
    "dolly headers": (row(response="### Response:\nx"), "### Response:\nx"),
    "right to left": (raw("\u05e9\u05dc\u05d5\u05dd \u202e x"), None),
    "emoji of several": (raw(EMOJI), EMOJI),
    "combining marks": (raw("e\u0301" * 50), "e\u0301" * 50),
    "private use": (row(response="\ue0f0x\ue0f1"), "\ue0f0x\ue0f1"),
    "not a character": (row(response="\uffff"), "\uffff"),
    "pair of surrogates": (raw(r"\ud83d\ude00"), "\U0001f600"),
    "unknown columns": (row(other=[1, {"x": None}]), "r"),
    "huge integer beside": (row(other=10**400), "r"),
    "NaN beside": ('{"instruction": "i", "response": "r", "x": NaN}', "r"),
    "null context": (row(context=None), "r"),
    "blank around": (row(response=" \t r \n"), " \t r"),
    "carriage return at the end": (raw("r") + "\r", "r"),
    "white space in front": (row(response="    return 1\n"), "    return 1"),
    "number": (row(response=3), "3"),
    "bool": (row(response=True), "true"),
    "number to ask": (row(instruction=3), "r"),
    "number of a kind": (row(category=7), "r"),
    "list of kinds": (row(category=[7]), "r"),
    "huge integer": (row(response=10**400), str(10**400)),
}  # fmt: skip
# Refused: the reason that it is counted by.
REFUSED = {
    "duplicate keys": (
        '{"response": "a", "instruction": "i", "response": "b"}', "not JSON",
    ),
    "list": (row(response=["r"]), "wrong type"),
    "object": (row(response={"r": 1}), "wrong type"),
    "list to read": (row(context=["c"]), "wrong type"),
    "lone surrogate": (raw(r"a\ud800b"), "not Unicode"),
    "array": ("[1, 2]", "not JSON"),
    "string": ('"text"', "not JSON"),
    "number alone": ("17", "not JSON"),
    "null alone": ("null", "not JSON"),
    "torn": ('{"instruction": "i", "resp', "not JSON"),
    "two in a line": (GOOD + GOOD, "not JSON"),
    "single quotes": ("{'instruction': 'i', 'response': 'r'}", "not JSON"),
    "deeply nested": ("[" * 100_000 + "]" * 100_000, "not JSON"),
    "latin-1": (raw("caf\xe9").encode("latin-1"), "not JSON"),
    "UTF-16": (GOOD.encode("utf-16"), "not JSON"),
    "tab in a string": (raw("a\tb"), "not JSON"),
    "no messages": ('{"messages": []}', "wrong type"),
    "messages of a string": ('{"messages": "hello"}', "wrong type"),
    "message of a string": ('{"messages": ["hello"]}', "wrong type"),
    "message without a role": ('{"messages": [{"content": "x"}]}', "wrong type"),
    "message of a strange role": (
        '{"messages": [{"role": "robot", "content": "x"}]}', "wrong type",
    ),
}  # fmt: skip
# Dropped in either mode, and counted.
EMPTY = {
    "empty answer": (row(response=""), "empty response"),
    "blank answer": (row(response=" \n\t\u00a0"), "empty response"),
    "null answer": (row(response=None), "empty response"),
    "blank request": (row(instruction=" "), "empty instruction"),
}


def as_bytes(line):
    return line if isinstance(line, bytes) else line.encode()


def write(tmp_path, line):
    """The row as the second of three."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), as_bytes(line), GOOD.encode(), b""]))
    return path


def load(path, **changes):
    return load_rows(DataConfig(path=str(path), **changes), 0)


def test_there_are_enough_of_them():
    assert len(KEPT) + len(REFUSED) + len(EMPTY) >= 40


@pytest.mark.parametrize("name", KEPT)
def test_an_odd_row_is_kept_as_it_is(tmp_path, name):
    line, expected = KEPT[name]
    for bad_lines in ("stop", "skip"):
        rows = load(write(tmp_path, line), bad_lines=bad_lines)
        assert len(rows.marks) == 3 and not rows.dropped
        text = list(rows.records())[1].turns[-1].text
        assert text == (expected or json.loads(line)["response"])
        assert list(rows.records())[1].where == "rows.jsonl:2"


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_row_is_named_or_counted(tmp_path, name):
    line, reason = REFUSED[name]
    path = write(tmp_path, line)
    with pytest.raises(UserError, match=r"rows\.jsonl:[23]"):
        load(path)
    rows = load(path, bad_lines="skip")
    # UTF-16 has a byte 10 within, which makes two lines of it.
    lines = path.read_bytes().count(b"\n")
    assert len(rows.marks) + sum(rows.dropped.values()) == lines
    assert rows.dropped.keys() == {reason}
    assert all(len(example) < 1000 for example in rows.examples)


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_row_is_counted(tmp_path, name):
    line, reason = EMPTY[name]
    for bad_lines in ("stop", "skip"):
        rows = load(write(tmp_path, line), bad_lines=bad_lines)
        assert len(rows.marks) == 2 and rows.dropped == {reason: 1}


def test_all_of_them_in_one_file_add_up(tmp_path):
    everything = [*KEPT.values(), *REFUSED.values(), *EMPTY.values()]
    lines = [as_bytes(line) for line, _ in everything]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line for line in lines if b"\n" not in line))
    rows = load(path, bad_lines="skip")
    total = path.read_bytes().count(b"\n") + 1
    assert len(rows.marks) + sum(rows.dropped.values()) == total
    assert len(rows.marks) == len(KEPT)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n\n"])
def test_line_ends_of_any_kind(tmp_path, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((GOOD + end + GOOD).encode())
    assert len(list(load(path).records())) == 2


def parquet(columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def text_csv(*rows):
    file = io.StringIO()
    csv.writer(file).writerows([("instruction", "response"), *rows])
    return file.getvalue().encode()


MANY = "\n".join([GOOD] * 1000).encode()
FILES = {
    "cut.jsonl.gz": gzip.compress(MANY)[:-40],
    "cut.jsonl.bz2": bz2.compress(MANY)[:-40],
    "none.jsonl.gz": b"no archive at all",
    "none.jsonl.zst": b"no archive at all",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\t\n",
    "empty.json": b"",
    "object.json": b'{"rows": [\n]}',
    "torn.json": b"[" + GOOD.encode() + b",",
    "nested.json": b"[" * 100_000,
    "empty.csv": b"",
    "header.csv": b"instruction,response\r\n",
    "unbalanced.csv": b'instruction,response\r\n"a,b\r\nc,d\r\n',
    "empty.parquet": b"",
    "none.parquet": b"PAR1 nothing PAR1",
    "other.parquet": parquet({"question": ["a"], "answer": ["b"]}),
    "numbers.parquet": parquet({"instruction": ["i"], "response": [[2]]}),
    "short.csv": b"instruction,response\r\na,b\r\nc\r\n",
    "long.csv": b"instruction,response\r\na,b\r\nc,d,e\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    with pytest.raises(UserError, match=re.escape(name)):
        load(tmp_path / name)


def test_fields_of_csv_may_hold_anything(tmp_path):
    fields = [("a\r\nb", 'c "d" e'), ("f,g", "h\0i"), ("?\u2028", "\U0001f600")]
    (tmp_path / "rows.csv").write_bytes(text_csv(*fields))
    found = [r.turns[-1].text for r in list(load(tmp_path / "rows.csv").records())]
    assert found == [answer for _, answer in fields]


def peak_of_reading(path):
    tracemalloc.start()
    try:
        for _, found in read_rows(path):
            assert not isinstance(found, BadRowError)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    peaks = []
    for count in (200, 2000):
        path = tmp_path / f"{count}.jsonl{suffix}"
        data = ((row(response="x" * 5000) + "\n") * count).encode()
        path.write_bytes(gzip.compress(data, 1) if suffix else data)
        peaks.append(peak_of_reading(path))
    # 10 MB more to read. Threads that watch other commands need some of it, too.
    assert peaks[1] - peaks[0] < len(data) / 20


def test_what_is_skipped_is_not_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n" + (row(response=["x" * 5000]) + "\n") * 1000)
    rows = load(path, bad_lines="skip")
    assert rows.dropped == {"wrong type": 1000}
    assert sum(map(len, rows.examples)) < 200_000
