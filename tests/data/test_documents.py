"""Every kind of file gives its documents, whole and in order, or says what is wrong."""

import bz2
import csv
import gzip
import http.client
import io
import json
import sys
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hub_fakes import COMMIT, HubDataset, fake_hub
from text_helpers import make_texts, text_and_data, text_config, write_texts
from waiting import PATIENCE

from research.core.errors import STUCK, UnreachableError, UserError
from research.core.hub_access import HubAddress, ask_hub
from research.data import hub_rows
from research.data.batch_order import still
from research.data.dropped_documents import DroppedDocuments
from research.data.text import document_readers
from research.data.text.text_sources import open_sources

TEXTS = make_texts(20)
PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}


def read(tmp_path, where, alive=still, **changes):
    """Documents as `(text, where)`, and what was dropped."""
    (source,) = open_sources(
        *text_and_data(text_config(tmp_path, f"s={where}", **changes))
    )
    dropped = DroppedDocuments()
    found, parts = [], None
    for piece in source.read(source.files, dropped, alive=alive):
        assert piece.text and len(piece.text) <= document_readers.PIECE_BYTES
        assert piece.starts == (parts is None)
        parts = [] if piece.starts else parts
        parts.append(piece.text)
        if piece.ends:
            found.append(("".join(parts), piece.where))
            parts = None
    assert parts is None, "the last document ends"
    return found, dict(dropped.counts)


def texts_of(found):
    return [text for text, _ in found]


def in_csv(texts):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue()


ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
CONTENT = {
    ".jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    ".json": json.dumps(ROWS),
    ".csv": in_csv(TEXTS),
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", CONTENT)
def test_files_of_rows_give_a_document_a_row(tmp_path, monkeypatch, kind, packed):
    monkeypatch.setattr(document_readers, "PIECE_BYTES", 50)
    path = tmp_path / f"rows{kind}{packed}"
    path.write_bytes(PACK[packed](CONTENT[kind].encode()))
    found, left_out = read(tmp_path, path)
    assert texts_of(found) == TEXTS and not left_out


@pytest.mark.parametrize("kind", CONTENT)
def test_long_rows_come_in_pieces(tmp_path, kind):
    texts = ["line of a long document\n" * 20_000, "short"]
    rows = [{"text": text} for text in texts]
    content = {".jsonl": "\n".join(map(json.dumps, rows)), ".json": json.dumps(rows)}
    (tmp_path / f"a{kind}").write_text(content.get(kind) or in_csv(texts), newline="")
    assert texts_of(read(tmp_path, tmp_path / f"a{kind}")[0]) == texts


def test_parquet_and_array_records_do_too(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    for name in ("a.parquet", "a.array_record"):
        assert texts_of(read(tmp_path, tmp_path / name)[0]) == TEXTS


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("limit", [7, 64, 1000])
def test_plain_text_comes_in_pieces_that_make_it_up(
    tmp_path, monkeypatch, packed, limit
):
    monkeypatch.setattr(document_readers, "PIECE_BYTES", limit)
    text = "".join(TEXTS) + "longwithoutaspace" * 20 + "é" * 33
    path = tmp_path / "shelf" / f"book.txt{packed}"
    path.parent.mkdir()
    path.write_bytes(PACK[packed](text.encode()))
    assert read(tmp_path, path.parent)[0] == [(text, path.name)]


def test_a_plain_file_by_itself_is_many_documents_that_make_it_up(
    tmp_path, monkeypatch
):
    """With one document there would be nothing to hold out."""
    monkeypatch.setattr(document_readers, "PART_BYTES", 100)
    path = tmp_path / "book.txt"
    path.write_text("".join(TEXTS))
    found = texts_of(read(tmp_path, path)[0])
    assert "".join(found) == "".join(TEXTS)
    assert len(found) > 10 and max(map(len, found)) <= 100


def test_pieces_end_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(document_readers, "PIECE_BYTES", 64)
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "a.txt").write_text("some words in a line\r\n" * 50, newline="")
    (source,) = open_sources(*text_and_data(text_config(tmp_path, f"s={folder}")))
    pieces = list(source.read(source.files))
    assert len(pieces) == 25 and all(p.text.endswith("line\r\n") for p in pieces)


def test_a_folder_is_read_in_order_without_what_is_hidden_or_binary(tmp_path):
    folder = write_texts(tmp_path / "corpus" / "b", TEXTS[:3])
    write_texts(tmp_path / "corpus" / ".git", ["hidden"])
    corpus = tmp_path / "corpus"
    (corpus / "a.md").write_text("first")
    (corpus / "c.jsonl").write_text('{"text": "row"}\n')
    (corpus / ".hidden").write_text("hidden")
    (corpus / "z.bin").write_bytes(b"text\0more")
    (corpus / "z.gz").write_bytes(gzip.compress(b"\0" * 10))
    (corpus / "empty").write_bytes(b"")
    (folder / "broken").symlink_to("nowhere")
    run = write_texts(tmp_path / "corpus" / "runs" / "one", ["of a run"])
    write_texts(run / "deep", ["of a run"])
    for name in ("config.json", "identity.json"):  # They make it a run directory.
        (run / name).write_text('{"text": "of a run"}')
    found, left_out = read(tmp_path, corpus)
    assert texts_of(found) == ["first", *TEXTS[:3], "row"]
    assert [where for _, where in found][:2] == ["a.md", "b/00000.txt"]
    assert left_out == {"binary file": 2, "empty": 1}


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path, tmp_path / "a.txt")[0] == [("hello", "a.txt")]


@pytest.mark.parametrize("before", [0, 5, 60, 61, 64, 200])
def test_bytes_that_are_not_utf8_stop_or_are_skipped_or_replaced(
    tmp_path, monkeypatch, before
):
    monkeypatch.setattr(document_readers, "PIECE_BYTES", 64)
    folder = write_texts(tmp_path / "c", ["good"])
    bad = b"\n" * min(before, 7) + b"x" * max(before - 7, 0)
    (folder / "bad").write_bytes(b"\xef\xbb\xbf" + bad + b"\xc3(" + b"y\n" * 99)
    said = rf"^bad:{min(before, 7) + 1}: byte {before + 3} of .*undecodable=skip"
    with pytest.raises(UserError, match=said):
        read(tmp_path, folder)
    found, left_out = read(tmp_path, folder, undecodable="skip")
    assert texts_of(found) == ["good"] and left_out == {"not UTF-8": 1}
    found, left_out = read(tmp_path, folder, undecodable="replace")
    assert "".join(texts_of(found)[1:]) == bad.decode() + "\ufffd(" + "y\n" * 99
    assert not left_out


BAD_ROWS = {
    "rows.jsonl": b'{"text": "good"}\n{"text": "\xff!"}\n',
    "rows.json": b'[{"text": "good"}, {"text": "\xff!"}]',
    "rows.csv": b"text\ngood\n\xff!\n",
    "escaped.jsonl": b'{"text": "good"}\n{"text": "\\ud800!"}\n',
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_are_not_utf8_do_likewise(tmp_path, name):
    (tmp_path / name).write_bytes(BAD_ROWS[name])
    with pytest.raises(UserError, match=rf"^{name}:.*undecodable=skip"):
        read(tmp_path, tmp_path / name)
    found, left_out = read(tmp_path, tmp_path / name, undecodable="skip")
    assert texts_of(found) == ["good"] and left_out == {"not UTF-8": 1}
    found, _ = read(tmp_path, tmp_path / name, undecodable="replace")
    assert texts_of(found) == ["good", "\ufffd!"]


def test_records_that_are_not_utf8_do_likewise(tmp_path):
    path = tmp_path / "a.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in (b"good", b"b\xff", b""):
        writer.write(record)
    writer.close()
    with pytest.raises(UserError, match=r"^a\.arrayrecord: record 2: byte 1 "):
        read(tmp_path, path)
    found, left_out = read(tmp_path, path, undecodable="skip")
    assert texts_of(found) == ["good"] and left_out == {"not UTF-8": 1, "empty": 1}
    assert texts_of(read(tmp_path, path, undecodable="replace")[0])[1] == "b\ufffd"


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"text": "cut', "not JSON"),
        ("[1]", "not JSON"),
        ('{"text": 3}', "wrong type"),
        ('{"text": null}', "wrong type"),
    ],
)
def test_bad_lines_stop_with_their_number_or_are_counted(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": ""}}\n')
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: .*bad_lines=skip"):
        read(tmp_path, path)
    found, left_out = read(tmp_path, path, data={"bad_lines": "skip"})
    assert texts_of(found) == ["good"] and left_out == {reason: 1, "empty": 1}


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_missing_column_is_named_with_its_nearest(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text(CONTENT[kind])
    with pytest.raises(UserError, match=r"^rows.*\d: no column 'txet'.*mean 'text'"):
        read(tmp_path, path, column="txet")


def test_the_standard_library_is_python_without_its_tests(tmp_path):
    (source,) = open_sources(*text_and_data(text_config(tmp_path, "s=stdlib")))
    names = [item.name for item in source.files]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert "json/decoder.py" in names and "pydoc_data/topics.py" not in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__"}
    found, left_out = read(tmp_path, "stdlib")
    assert len(found) > 400 and set(left_out) <= {"empty"}
    assert source.text_bytes > 5e6


@pytest.mark.parametrize(
    "sources, said",
    [
        ([], "is empty"),
        (["stdlib"], "write name=where"),
        (["a/b=stdlib"], "letters, digits"),
        (["=stdlib"], "letters, digits"),
        (["a="], "write name=where"),
        (["a=stdlib", "a=stdlib"], "two named 'a'"),
        (["a=/nowhere/at/all"], r"does not exist; .* hub://owner/name\["),
        (["a=/nowhere/*.txt"], r"it takes no patterns: give stdlib, a file or a fold"),
        (["a=some-lab/text"], r"does not exist; .* is written hub://some-lab/text$"),
    ],
)
def test_sources_that_cannot_be_are_said(tmp_path, sources, said):
    with pytest.raises(UserError, match=said):
        open_sources(*text_and_data(text_config(tmp_path, *sources)))


def test_a_folder_without_files_is_said(tmp_path):
    write_texts(tmp_path / "c" / ".hidden", ["x"])
    with pytest.raises(UserError, match="has no files"):
        open_sources(*text_and_data(text_config(tmp_path, f"a={tmp_path / 'c'}")))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.bz2", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_files_are_named(tmp_path, name, damage):
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        packed = PACK[path.suffix]((CONTENT[".jsonl"] * 50).encode())
        path.write_bytes(packed)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"noise" * 99)
    with pytest.raises(UserError, match=path.name):
        read(tmp_path, path)


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    shelf, attic = tmp_path / "shelf", tmp_path / "attic"
    write_texts(shelf / "b", ["in b"])
    write_texts(attic / "deep", ["in attic"])
    (shelf / "attic").symlink_to(attic)
    (shelf / "again").symlink_to(attic / "deep")
    (shelf / "a").symlink_to(shelf / "b")
    (shelf / "loop").symlink_to(shelf)
    (attic / "up").symlink_to(tmp_path)
    (shelf / "nowhere.txt").symlink_to(tmp_path / "gone")
    found, _ = read(tmp_path, shelf)
    assert sorted(texts_of(found)) == ["in attic", "in b"]
    assert ("in b", "b/00000.txt") in found, "the real folder names its files"


def test_a_hub_out_of_reach_is_said_within_seconds(tmp_path):
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"out of reach.*local file"):
        open_sources(*text_and_data(text_config(tmp_path, "a=hub://no/where")))
    assert time.monotonic() - begun < PATIENCE


def test_a_hub_data_set_is_streamed_by_subset_split_and_revision(tmp_path, monkeypatch):
    asked = fake_hub(monkeypatch, HubDataset([ROWS[:7], ROWS[7:]]))
    found, _ = read(tmp_path, "hub://o/n@v2:en@test")
    assert texts_of(found) == TEXTS and found[1][1] == "o/n: row 2"
    assert asked == [
        {
            "name": "o/n",
            "subset": "en",
            "split": "test",
            "revision": COMMIT,
            "streaming": True,
        }
    ]
    fake_hub(monkeypatch, None)
    sys.modules["datasets"].load_dataset = lambda *_, **__: 1 / 0
    with pytest.raises(UserError, match=r"cannot be read .*division"):
        read(tmp_path, "hub://o/n")


def test_a_dropped_connection_is_retried_where_it_was(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(hub_rows.time, "sleep", waits.append)
    dataset = HubDataset([ROWS[:7], ROWS[7:]], drops=[0, 4, 5, 12])
    fake_hub(monkeypatch, dataset)
    assert texts_of(read(tmp_path, "hub://o/n")[0]) == TEXTS
    assert dataset.reads == len(ROWS), "no row is read twice"
    assert sum(waits) == 4 * hub_rows.FIRST_WAIT


def test_a_hub_that_stays_away_ends_the_run_and_may_be_tried_again(
    tmp_path, monkeypatch
):
    waits = []
    monkeypatch.setattr(hub_rows.time, "sleep", waits.append)

    class Away(HubDataset):
        def shard(self, *_):
            raise ConnectionError("no route")

    fake_hub(monkeypatch, Away([ROWS]))
    with pytest.raises(UnreachableError, match=r"no route.*kept: start the same"):
        read(tmp_path, "hub://o/n", alive=lambda: waits.append("alive"))
    # 2 + 4 + ... + 64 seconds, and no second of them without a sign of life.
    assert waits == ["alive", 1.0] * 126
    assert UnreachableError.exit_code == STUCK


class HTTPDropError(Exception):
    """As `aiohttp` raises it in the middle of a file; it is no OSError."""

    __module__ = "aiohttp.client_exceptions"


def wrapped(error):
    """The error of a library that was raised because of `error`."""
    outer = RuntimeError("the shard cannot be generated")
    outer.__cause__ = error
    return outer


def failing_once(monkeypatch, error):
    """A hub whose dataset raises `error` before the third row, the first time."""
    dataset, errors = HubDataset([ROWS]), [error]

    whole = dataset.shard
    dataset.shard = lambda *part: FailingPart(whole(*part), errors)
    fake_hub(monkeypatch, dataset)


class FailingPart:
    def __init__(self, part, errors):
        self._part, self._errors = part, errors
        self.state_dict, self.load_state_dict = part.state_dict, part.load_state_dict

    def __iter__(self):
        for number, row in enumerate(self._part):
            if number == 2 and self._errors:
                raise self._errors.pop()
            yield row


@pytest.mark.parametrize(
    ("error", "network"),
    [
        (HTTPDropError("half a file"), True),
        (http.client.IncompleteRead(b"half"), True),
        (wrapped(TimeoutError("too slow")), True),
        (ValueError("no JSON in line 3"), False),
        (wrapped(KeyError("text")), False),
        (MemoryError("a row of 90 GB"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_failures_of_the_network_are_retried(
    tmp_path, monkeypatch, error, network
):
    waits = []
    monkeypatch.setattr(hub_rows.time, "sleep", waits.append)
    failing_once(monkeypatch, error)
    if network:
        assert texts_of(read(tmp_path, "hub://o/n")[0]) == TEXTS and waits
        return
    with pytest.raises(UserError, match=r"=hub://o/n, row 3, cannot be read") as failed:
        read(tmp_path, "hub://o/n")
    assert failed.value.exit_code == 2 and not waits


@pytest.mark.parametrize(
    "where", ["hub://", "hub://a/b/c", "hub://o/n@", "hub://o/n@a b", "hub://o/n::x@"]
)
def test_a_malformed_hub_address_is_said(tmp_path, where):
    with pytest.raises(UserError, match=r"write hub://owner/name\[@revision\]"):
        open_sources(*text_and_data(text_config(tmp_path, f"a={where}")))


@pytest.mark.parametrize(
    "where, parts",
    [
        ("hub://o/n", ("o/n", "", "", "")),
        ("hub://gpt2@main", ("gpt2", "main", "", "")),
        ("hub://o/n@refs/pr/1:en", ("o/n", "refs/pr/1", "en", "")),
        ("hub://o/n:en@train[:9%]", ("o/n", "", "en", "train[:9%]")),
        ("hub://o/n:@test", ("o/n", "", "", "test")),
    ],
)
def test_a_hub_address_has_its_parts_and_is_written_as_it_was(where, parts):
    found = HubAddress.parse(where, "dataset")
    assert (found.name, found.revision, found.subset, found.split) == parts
    assert str(found) == where


def test_a_hub_that_hangs_is_given_up(monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: hang.wait())
    answer = ask_hub(HubAddress("a/b", "dataset"), 0.2)
    assert not answer.revision and "0.2 seconds" in answer.reason
    hang.set()


def test_a_folder_of_code_is_read_around_its_settings(tmp_path):
    """With `bad_lines=skip`; else the odd file is named."""
    folder = write_texts(tmp_path / "code", TEXTS[:3])
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"package\.json:1"):
        read(tmp_path, folder)
    found, left_out = read(tmp_path, folder, data={"bad_lines": "skip"})
    assert texts_of(found) == TEXTS[:3]
    assert left_out == {"no text column": 2}
