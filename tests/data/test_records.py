"""Rows of every kind of file become the same records, or an error that says where."""

import collections
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from research.config.data_knobs import ColumnsConfig, DataConfig, TextConfig
from research.config.run_config import Config
from research.core.errors import UserError
from research.data.instructions import row_selection
from research.data.instructions.row_columns import to_record
from research.data.instructions.row_selection import (
    RowMark,
    RowSource,
    draw,
    held_out_count,
    load_rows,
)
from research.data.row_readers import READERS, Place, RowReader, read_rows
from research.data.text.text_sources import open_sources
from research.tokenize.conversation import Turn

ROWS = [
    {"instruction": "Say é", "context": "", "response": "é", "category": "a"},
    {
        "instruction": "Two\nlines",
        "context": "c, d",
        "response": '"2"',
        "category": "b",
    },
    {"instruction": " padded ", "context": "x", "response": "y\n", "category": "a"},
]
GOOD = '{"instruction": "i", "response": "r"}'


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_csv(rows):
    lines = [[f'"{v.replace(chr(34), chr(34) * 2)}"' for v in r.values()] for r in rows]
    return "\r\n".join(",".join(line) for line in [ROWS[0].keys(), *lines])


CONTENT = {
    ".jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    ".json": json.dumps(ROWS),
    ".csv": as_csv(ROWS),
}


def load(path, seed=0, **changes):
    return load_rows(DataConfig(path=str(path), **changes), seed)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", CONTENT)
def test_every_text_format_gives_the_same_records(tmp_path, kind, suffix, mark):
    path = write(tmp_path / f"rows{kind}{suffix}", mark + CONTENT[kind])
    check_rows(list(load(path).records()))


def test_parquet_gives_the_same_records(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    check_rows(list(load(path).records()))


def check_rows(records):
    found = [
        (*(turn.text for turn in record.turns), record.context, record.category)
        for record in records
    ]
    assert found == [
        ("Say é", "é", "", "a"),
        ("Two\nlines", '"2"', "c, d", "b"),
        ("padded", "y", "x", "a"),
    ]
    assert [turn.role for turn in records[0].turns] == ["user", "assistant"]


def test_rows_of_messages_are_conversations(tmp_path):
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]
    path = write(tmp_path / "rows.jsonl", json.dumps({"messages": messages}))
    (record,) = load(path).records()
    expected = tuple(Turn(role, f"text {i}") for i, role in enumerate(roles))
    assert record.turns == expected and record.context == ""


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"instruction": "i", ', "not JSON"),
        ("[1, 2]", "not JSON"),
        (b'{"instruction": "\xff", "response": "r"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"instruction": ' + "1" * 5000 + ', "response": "r"}', "not JSON"),
        ('{"instruction": {"i": 3}, "response": "r"}', "wrong type"),
        ('{"instruction": "i", "response": ["r"]}', "wrong type"),
        ('{"instruction": "\\ud800", "response": "r"}', "not Unicode"),
        ('{"messages": "hello"}', "wrong type"),
        ('{"messages": []}', "wrong type"),
        ('{"messages": [{"role": "robot", "content": "c"}]}', "wrong type"),
        ('{"messages": [{"role": "assistant", "content": "c"}]}', "not alternating"),
        ('{"messages": [{"role": "user", "content": "c"}]}', "not alternating"),
        ('{"messages": [{"role": "system", "content": "c"}]}', "not alternating"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_line_stops_with_its_number_or_is_counted(tmp_path, row, reason):
    row = row if isinstance(row, bytes) else row.encode()
    content = b"\n".join([GOOD.encode(), b"", row, GOOD.encode()])
    path = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: .*bad_lines=skip"):
        load(path)
    rows = load(path, bad_lines="skip")
    assert rows.dropped == {reason: 1} and len(rows.marks) == 2
    assert rows.examples[0].startswith("rows.jsonl:3: ")


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"instruction": "i", "response": " "}', "empty response"),
        ('{"instruction": "", "context": null, "response": "r"}', "empty instruction"),
    ],
)
def test_empty_rows_are_counted_and_never_stop(tmp_path, row, reason):
    rows = load(write(tmp_path / "rows.jsonl", f"{row}\n{GOOD}"))
    assert rows.dropped == {reason: 1} and len(rows.marks) == 1


def test_a_context_alone_is_an_instruction(tmp_path):
    row = '{"instruction": "", "context": "c", "response": "r"}'
    assert next(load(write(tmp_path / "rows.jsonl", row)).records()).context == "c"


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "rows.json",
            '[{"instruction": 1},\n oops]',
            r"rows\.json:2: not a JSON array",
        ),
        ("rows.json", '{"x":\n{}}', r"rows\.json:1: .* array of objects.*one dict"),
        ("rows.csv", 'instruction,response\ni,r\n"open,r\n', r"rows\.csv:\d"),
        (
            "rows.csv",
            "instruction,response\ni,r\ni,r,more\n",
            r"rows\.csv:3: not as many",
        ),
        ("rows.csv", "instruction,response\ni,r\ni\n", r"rows\.csv:3: not as many"),
        ("rows.csv", b"instruction,response\n\xff,r\n", r"rows\.csv:"),
        ("rows.parquet", b"PAR1 no PAR1", r"rows\.parquet is not readable parquet"),
        ("rows.jsonl", "", "has no usable row"),
        ("rows.txt", "hello", "unknown kind; it must end in .jsonl, .json"),
        ("rows.parquet.gz", b"", "."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        load(write(tmp_path / name, content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        load(tmp_path / "nowhere.jsonl")
    for written in ("some-lab/rows", "lab/rows_2.0", "lab/rows@main:sub@test"):
        with pytest.raises(UserError, match=f"does not exist; .*hub://{written}$"):
            load(written)
    with pytest.raises(UserError, match=r"not exist; .* hub://owner/name\["):
        load("rows.text")
    with pytest.raises(UserError, match=r"no file in folder .* ends in \.jsonl"):
        load(tmp_path)
    run = tmp_path / "runs" / "one"  # The files of a run are no rows of a folder.
    run.mkdir(parents=True)
    for name in ("config.json", "identity.json", "answers.json"):
        (run / name).write_text('[{"instruction": "q", "response": "a"}]')
    with pytest.raises(UserError, match=r"no file in folder .* ends in \.jsonl"):
        load(tmp_path)
    assert load(run / "answers.json").marks
    with pytest.raises(UserError, match="no file matches"):
        load(tmp_path / "*.csv")


@pytest.mark.parametrize("kind", ["cut short", "flipped", "not gzip"])
def test_a_damaged_archive_is_the_users_error(tmp_path, kind):
    lines = "\n".join(json.dumps({**ROWS[1], "context": str(i**9)}) for i in range(500))
    whole = gzip.compress(lines.encode())
    middle = len(whole) // 2
    damaged = {
        "cut short": whole[:middle],
        "flipped": whole[:middle] + bytes(b ^ 255 for b in whole[middle:]),
        "not gzip": lines.encode(),
    }
    (tmp_path / "rows.jsonl.gz").write_bytes(damaged[kind])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz cannot be read"):
        load(tmp_path / "rows.jsonl.gz")


def test_columns_are_mapped_and_a_wrong_mapping_names_the_nearest(tmp_path):
    row = '{"question": "q", "passage": "p", "answer": "a", "kind": "k"}'
    path = write(tmp_path / "rows.jsonl", row)
    columns = ColumnsConfig("question", "passage", "answer", "kind")
    (record,) = load(path, columns=columns).records()
    assert record.turns == (Turn("user", "q"), Turn("assistant", "a"))
    assert (record.context, record.category) == ("p", "k")
    wrong = ColumnsConfig(instruction="question", response="anwser")
    for bad_lines in ("stop", "skip"):
        # The mapping is wrong, not the row: skipping would leave nothing.
        with pytest.raises(UserError, match=r"'anwser'.*did you mean 'answer'") as said:
            load(path, columns=wrong, bad_lines=bad_lines)
        assert "config.data.columns.response" in str(said.value)


def test_where_names_every_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", CONTENT[".jsonl"])
    assert [where for where, _ in read_rows(path)] == [
        "rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:5",
    ]  # fmt: skip


def test_the_digest_follows_the_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", CONTENT[".jsonl"])
    copy = write(tmp_path / "copy.jsonl.gz", CONTENT[".jsonl"])
    other = write(tmp_path / "other.jsonl", CONTENT[".jsonl"].replace("é", "è"))
    assert load(path).sha256 == load(copy).sha256 != load(other).sha256


@pytest.fixture(scope="module")
def sample():
    """Without a network or a cache of the hub, as the environment here has it."""
    return load_rows(DataConfig(), seed=0)


def test_a_hub_that_answers_only_some_processes_is_used_by_none(monkeypatch):
    row = {"instruction": "Why?", "response": "So.", "context": "", "category": "qa"}
    rows = RowSource("far", lambda: iter([("hub:1", row), ("hub:2", row)]))
    monkeypatch.setattr(row_selection, "_hub_rows", lambda *_: rows)
    assert load_rows(DataConfig(), seed=0).source.origin.startswith("hub ")
    monkeypatch.setattr(row_selection.agreement, "everywhere", lambda flag: False)
    assert load_rows(DataConfig(), seed=0).source.origin == "embedded sample"


def test_the_embedded_sample_is_what_it_says(sample):
    assert sample.source.origin.startswith("embedded sample")
    assert len(sample.marks) == 512 and not sample.dropped
    assert sorted({mark.category for mark in sample.marks}) == [
        "brainstorming", "classification", "closed_qa", "creative_writing",
        "general_qa", "information_extraction", "open_qa", "summarization",
    ]  # fmt: skip
    counts = collections.Counter(mark.category for mark in sample.marks)
    assert min(counts.values()) >= 40


def test_no_sample_row_is_there_twice(sample):
    """By words alone, so that neither case nor punctuation hides a copy."""

    def words(text):
        kept = "".join(c if c.isalnum() else " " for c in text.lower())
        return " ".join(kept.split())

    for texts in (
        [words(r.turns[0].text + r.context) for r in sample.records()],
        [words(r.context) for r in sample.records() if r.context],
    ):
        assert len(set(texts)) == len(texts)


def test_sample_rows_have_a_context_where_their_category_needs_one(sample):
    for record in sample.records():
        needs = {"closed_qa", "information_extraction", "summarization"}
        assert (record.category not in needs) or record.context, record.where
        if record.category in ("open_qa", "general_qa"):
            assert not record.context, record.where


def test_no_sample_row_is_of_the_real_dolly(sample, dolly_path):
    """Its licence differs: no answer and no passage of it may be copied."""

    def texts(record):
        return {t for t in (record.turns[1].text, record.context) if len(t) > 20}

    dolly = list(load(dolly_path, bad_lines="skip").records())
    theirs = set().union(*map(texts, dolly))
    assert len(theirs) > 14_000
    for record in sample.records():
        assert not texts(record) & theirs, record.where


def records_of(counts):
    rows = [category for category, n in counts.items() for _ in range(n)]
    return [
        RowMark.of(
            i,
            to_record(
                {**ROWS[0], "context": str(i), "category": c}, ColumnsConfig(), f"r:{i}"
            ),
        )
        for i, c in enumerate(rows)
    ]


EDITIONS = [DataConfig(edition=1), DataConfig(edition=2)]


@pytest.mark.parametrize("config", EDITIONS, ids=["by seed", "by content"])
@pytest.mark.parametrize("count", [1, 7, 10, 33])
def test_the_split_is_disjoint_whole_and_proportional(count, config):
    counts = {"a": 50, "b": 30, "c": 13, "d": 7}
    records = records_of(counts)
    held, rest = draw(records, count, config, 3)
    assert len(held) == count
    assert sorted(held + rest, key=records.index) == records
    for part in (held, rest):
        assert part == sorted(part, key=records.index), "the order is kept"
    for category, n in counts.items():
        drawn = sum(record.category == category for record in held)
        assert abs(drawn - count * n / 100) < 1


def test_the_split_of_old_runs_depends_on_the_seed_alone():
    records = records_of({"a": 50, "b": 50})
    first = draw(records, 20, EDITIONS[0], 0)
    assert draw(records, 20, EDITIONS[0], 0) == first
    assert draw(records, 20, EDITIONS[0], 1) != first
    # As the version before the editions drew them.
    rng = np.random.default_rng(0)
    expected = {*rng.permutation(range(50))[:10], *rng.permutation(range(50, 100))[:10]}
    assert {records.index(record) for record in first[0]} == expected


@pytest.mark.parametrize("count, lower", [(5, True), (1, False)])
def test_a_split_that_leaves_nothing_is_refused(count, lower):
    with pytest.raises(UserError, match=rf"of {count}, .*eval_path") as said:
        draw(records_of({"a": count}), count, DataConfig(), 0)
    assert ("a lower config.data.held_out" in str(said.value)) == lower


def test_copies_count_as_rows():
    records = [record for record in records_of({"a": 10}) for _ in range(4)]
    held, rest = draw(records, 8, DataConfig(), 0)
    assert (len(held), len(rest)) == (8, 32)


def test_max_rows_draws_from_every_category_whatever_the_seed(sample):
    few = load_rows(DataConfig(max_rows=16), seed=0)
    counts = collections.Counter(mark.category for mark in few.marks)
    assert counts == {mark.category: 2 for mark in sample.marks}
    assert few.marks == load_rows(DataConfig(max_rows=16), seed=1).marks
    more = load_rows(DataConfig(max_rows=10**6), seed=0)
    assert more.marks == sample.marks


def test_a_new_format_is_one_line_for_rows_and_for_text(tmp_path, monkeypatch):
    """`.xlsx` is a binary format: no compression, and its size is not that of text."""

    def read(path, reading):
        lines = path.read_text().split("\n")
        for number in range(reading.start.at or 0, len(lines)):
            names = ("instruction", "response", "text")
            cells = zip(names, lines[number].split(";"), strict=True)
            yield Place(number), f"{path.name}: row {number + 1}", dict(cells)

    monkeypatch.setitem(READERS, ".xlsx", RowReader(read, is_plain=False))
    path = tmp_path / "rows.xlsx"
    path.write_text("a;b;c\nd;e;f")
    columns = ColumnsConfig(ignored=("text",))
    rows = load_rows(DataConfig(path=str(path), columns=columns), 0)
    assert [r.turns[-1].text for r in rows.records()] == ["b", "e"]
    config = Config(text=TextConfig(sources=(f"own={path}",)))
    [source] = open_sources(config.text, config.data)
    pieces = list(source.read(source.files, collections.Counter()))
    assert [(p.text, p.where) for p in pieces] == [
        ("c", "rows.xlsx: row 1"),
        ("f", "rows.xlsx: row 2"),
    ]
    assert source.text_bytes == 0
    packed = path.rename(tmp_path / "rows.xlsx.gz")
    with pytest.raises(UserError, match=r"kind.*xlsx; \.jsonl, \.json, \.csv may"):
        load_rows(DataConfig(path=str(packed)), 0)


@pytest.mark.parametrize(
    ("held_out", "rows", "edition", "count"),
    [
        (-1.0, 9, 0, 0),
        (-1.0, 10, 0, 1),
        (-1.0, 100, 0, 10),
        (-1.0, 600, 0, 48),
        (-1.0, 100, 2, 48),  # As in all runs of that time.
        (-1.0, 100, 1, 48),
        (0.0, 100, 0, 0),
        (0.25, 30, 0, 8),
        (0.001, 30, 0, 1),
        (7.0, 30, 2, 7),
    ],
)
def test_rows_are_held_out_by_number_by_share_or_by_size(
    held_out, rows, edition, count
):
    marks = [RowMark(i, bytes([i % 256, i // 256]), "", "") for i in range(rows)]
    config = DataConfig(held_out=held_out, edition=edition)
    assert held_out_count(config, marks) == count
    held, rest = draw(marks, count, config, 0)
    assert (len(held), len(rest)) == (count, rows - count)


def test_equal_rows_are_one_row_where_the_size_decides():
    marks = [RowMark(i, b"same", "", "") for i in range(50)]
    assert held_out_count(DataConfig(), marks) == 0
    for held_out in (0.99, 12.0, 13.0):
        few = [RowMark(i, bytes([i]), "", "") for i in range(12)]
        count = held_out_count(DataConfig(held_out=held_out), few)
        with pytest.raises(UserError, match=f"{count} rows .* out of 12, of which 12"):
            draw(few, count, DataConfig(), 0)


def test_only_a_number_or_a_share_of_rows_can_be_held_out():
    for wrong in (-0.5, -2.0, 1.5):
        with pytest.raises(UserError, match=r"data\.held_out"):
            Config(data=DataConfig(held_out=wrong))
    assert not Config(data=DataConfig(held_out=0.0)).evaluates
    own = DataConfig(held_out=0.0, path="a.jsonl", eval_path="b.jsonl")
    assert Config(data=own).evaluates and Config().evaluates
    silent = TextConfig(sources=("a=b",), held_out_share=0.0)
    assert not Config(data=DataConfig(kind="text"), text=silent).evaluates


@pytest.mark.parametrize(
    "roles, said",
    [
        ("user", "ends with a turn of the user, and the answer is missing"),
        ("system user assistant user", "turn of the user, and the answer is missing"),
        ("user assistant tool", "alternate user and assistant|turn of the tool"),
        ("user user", "must alternate user and assistant, not user user"),
        ("system", "must alternate user and assistant, not system"),
    ],
)
def test_a_chat_without_its_last_answer_says_that_it_is_missing(tmp_path, roles, said):
    messages = [{"role": role, "content": "c"} for role in roles.split()]
    content = json.dumps({"messages": messages}).encode()
    with pytest.raises(UserError, match=f"messages.*({said})"):
        load(write(tmp_path / "rows.jsonl", content))
