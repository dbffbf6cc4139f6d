"""JSON files that hold something else are named, and what can be read of them stays."""

import json

import pytest

from research.core.errors import UserError
from research.core.json_files import (
    NUMBER,
    read_json,
    read_json_lines,
    read_to_rewrite,
)
from research.core.visible_text import visible

SHAPE = {"name": str, "losses": [NUMBER], "end": int | None}
GOOD = {"name": "a", "losses": [1, 2.5], "end": None, "more": 1}
OTHERS = {
    "no JSON": (b"{", "Expecting property name"),
    "nothing": (b"", "Expecting value"),
    "other bytes": (b"\xff{}", "decode"),
    "too deep": (b"[" * 100_000, "recursion"),
    "a list": (b"[]", "it is [], not dict"),
    "no end": (b'{"name": "a", "losses": []}', "it lacks end"),
    "a number for text": (json.dumps(GOOD | {"name": 3}), "it.name is 3, not str"),
    "a bool for a number": (
        json.dumps(GOOD | {"losses": [1, True]}),
        "it.losses[1] is True, not",
    ),
    "text for a number": (json.dumps(GOOD | {"end": "x"}), "it.end is 'x', not int"),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_of_the_shape_is_read(tmp_path):
    path = write(tmp_path / "x.json", json.dumps(GOOD))
    assert read_json(path, SHAPE, "") == GOOD


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_one_line_with_the_file_and_a_way_back(tmp_path, name):
    content, said = OTHERS[name]
    path = write(tmp_path / "x.json", content)
    with pytest.raises(UserError) as raised:
        read_json(path, SHAPE, "restore a copy")
    message = str(raised.value)
    assert message.startswith(f"{path} cannot be used (")
    assert said in message and message.endswith("restore a copy")
    assert "\n" not in message and len(message) < 300


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"{path} cannot be used"):
            read_json(path, SHAPE, "")


def test_lines_that_cannot_be_read_cost_no_other(tmp_path, caplog):
    good = [json.dumps({"step": step}).encode() for step in (1, 2, 3)]
    bad = [b"{", b"\xff", b'{"step": "4"}', b"[]"]
    lines = [good[0], bad[0], good[1], *bad[1:], good[2]]
    path = write(tmp_path / "x.jsonl", b"\n".join(lines) + b"\n" + b'{"torn')
    expected = [{"step": 1}, {"step": 2}, {"step": 3}]
    assert read_json_lines(path, {"step": int}) == (expected, [2, 4, 5, 6, 8])
    before = path.read_bytes()
    assert read_to_rewrite(path, {"step": int}) == expected
    (copy,) = tmp_path.glob("x.jsonl.*")
    assert copy.read_bytes() == before
    assert f"{path}: 5 of 8 lines" in caplog.text and str(copy) in caplog.text
    write(path, good[0] + b"\n")
    assert read_to_rewrite(path, {"step": int}) == expected[:1]
    assert [*tmp_path.glob("x.jsonl.*")] == [copy]
    assert read_json_lines(tmp_path / "absent", dict) == ([], [])


def test_a_last_line_without_an_end_is_taken_or_kept_in_the_copy(tmp_path, caplog):
    path = write(tmp_path / "x.jsonl", '{"step": 1}\n{"step": 2}')
    assert read_to_rewrite(path, {"step": int}) == [{"step": 1}, {"step": 2}]
    assert not caplog.text and [*tmp_path.iterdir()] == [path]
    write(path, "my notes")
    assert read_to_rewrite(path, {"step": int}) == []
    (copy,) = tmp_path.glob("x.jsonl.*")
    assert copy.read_text() == "my notes" and "1 of 1 lines" in caplog.text


def test_a_name_that_is_taken_by_something_else_is_no_absent_file(tmp_path):
    assert read_json(tmp_path / "x", SHAPE, "", absent={}) == {}
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "link"):
        with pytest.raises(UserError, match=f"{name} cannot be used"):
            read_json(tmp_path / name, SHAPE, "", absent={})
        with pytest.raises(UserError, match=f"{name} cannot be used"):
            read_json_lines(tmp_path / name, SHAPE)


def test_a_shape_may_hold_for_all_other_entries_or_depend_on_the_value(tmp_path):
    def shape(value):
        return {"size": int if value.get("known") else int | None, ...: str | bool}

    path = tmp_path / "x.json"
    for known, size, more, said in (
        (True, 3, "", ""),
        (False, None, "", ""),
        (True, None, "", "it.size is None"),
        (True, 3, 5, "it.more is 5"),
    ):
        write(
            path, json.dumps({"known": str(known)[:known], "size": size, "more": more})
        )
        if not said:
            assert read_json(path, shape, "")["size"] == size
            continue
        with pytest.raises(UserError, match=said):
            read_json(path, shape, "")


def test_what_a_terminal_would_obey_is_written_out():
    assert visible("a\x1b[31m\rb\u202ec\ud800d\x9be") == (
        r"a\x1b[31m\rb\u202ec\ud800d\x9be"
    )
    for text in ("a\tb\nc", "\u00e9\u4e2d\U0001f600", "[/x] $\\R$ a|b"):
        assert visible(text) == text
