"""Columns that are filled and not used are named; those of material stop the run."""

import json
import re
import shlex

import pytest

from research.config.data_knobs import NEWEST_EDITION, ColumnsConfig, DataConfig
from research.core.errors import UserError
from research.data.instructions.row_selection import load_rows
from research.data.instructions.unused_columns import (
    describe_unused,
    is_material,
    needs_look,
)

CHAT = [
    {"role": "user", "content": "Why is it so?"},
    {"role": "assistant", "content": "Because."},
]
ROW = {"instruction": "Why is it so?", "response": "Because."}


def load(folder, rows, edition=0, **columns):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ColumnsConfig(**columns)
    return load_rows(DataConfig(path=str(path), columns=config, edition=edition), 0)


def flags_of(message):
    """The columns that the first line of a refusal says to map."""
    words = shlex.split(message.split("map it with ")[1].split("\n")[0])
    given = [word.split("columns.")[1] for word in words if "columns." in word]
    return dict(each.split("=") for each in given)


LOST = {
    "beside the own names": ({**ROW, "input": "Ice floats."}, {"context": "input"}),
    "spelt in its own way": (
        {**ROW, "Input Texts": "Ice floats."},
        {"context": "Input Texts"},
    ),
    "of Alpaca": (
        {"instruction": "q", "output": "a", "document": "Ice floats."},
        {"response": "output", "context": "document"},
    ),
    "of Alpaca, whose input is always blank": (
        {"instruction": "q", "input": " ", "output": "a", "document": "Ice floats."},
        {"response": "output", "context": "document"},
    ),
    "quoted by the answer": (
        {**ROW, "response": "It says: Ice floats.", "document": "Ice floats."},
        {"context": "document"},
    ),
    "of a pair": (
        {"prompt": "q", "completion": "a", "passage": "Ice floats."},
        {"instruction": "prompt", "response": "completion", "context": "passage"},
    ),
    "of the system": (
        {**ROW, "system_prompt": "Ice floats."},
        {"system": "system_prompt"},
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_lost_material_stops_the_run_and_the_flags_that_are_named_cure_it(
    tmp_path, name
):
    row, flags = LOST[name]
    bare = {**row, list(row)[-1]: None}
    with pytest.raises(UserError, match=r"in 1 row, as in rows\.jsonl:2") as caught:
        load(tmp_path, [bare, row])
    found = flags_of(str(caught.value))
    assert found == flags
    (record,) = load(tmp_path, [row], **found).records()
    said = [record.context, *(turn.text for turn in record.turns)]
    assert "Ice floats." in said
    last = str(caught.value).split("\n")[-1]
    ignored = tuple(re.findall(r"'([^']+)'", last))
    assert load(tmp_path, [row], ignored=ignored).unused == {}


def test_material_beside_a_chat_or_a_context_cannot_be_mapped(tmp_path):
    with pytest.raises(UserError, match="the messages in 'messages' must have it"):
        load(tmp_path, [{"messages": CHAT, "passage": "Ice floats."}])
    with pytest.raises(UserError, match="join it with 'context'"):
        load(tmp_path, [{**ROW, "context": "Ice.", "passage": "Ice floats."}])
    pair = {"prompt": CHAT[:1], "completion": CHAT[1:], "context": "Ice floats."}
    flags = {"instruction": "prompt", "response": "completion"}
    for given in ({}, flags):
        with pytest.raises(UserError, match="the messages in 'prompt' must have it"):
            load(tmp_path, [pair], **given)


def test_a_list_is_mapped_once_it_is_joined(tmp_path):
    row = {**ROW, "contexts": ["Ice floats.", "Iron sinks."]}
    with pytest.raises(UserError, match="join each list into one text, then") as caught:
        load(tmp_path, [row])
    row["contexts"] = "\n\n".join(row["contexts"])
    (record,) = load(tmp_path, [row], **flags_of(str(caught.value))).records()
    assert record.context == "Ice floats.\n\nIron sinks."


def test_columns_that_repeat_the_row_are_only_named(tmp_path):
    whole = "### Instruction:\nWhy is it\nso?\n\n### Response:\nBecause."
    rows = [
        {**ROW, "text": whole, "id": 7, "input": " ", "history": [], "question": None},
        {**ROW, "messages": CHAT},
        {"messages": CHAT, "prompt": "Why is it so?"},
        {**ROW, "content": "Because.\n"},
    ]
    facts = load(tmp_path, rows).unused
    assert {name: each["rows"] for name, each in facts.items()} == {
        "text": 1, "id": 1, "messages": 1, "prompt": 1, "content": 1,
    }  # fmt: skip
    assert facts["id"] == {
        "rows": 1, "share": 1 / 4, "where": "rows.jsonl:1", "letters": 1,
        "is_material": False, "labels": 0,
    }  # fmt: skip
    assert not any(each["is_material"] for each in facts.values())


def test_a_column_of_few_values_may_be_the_category(tmp_path):
    rows = [
        ROW | {"topic": "ab"[n % 2], "id": n, "all": "x", "note": f"{n % 2} " * 30}
        for n in range(8)
    ]
    rows[0] |= {"seldom": "a", "tags": ["a", "b"]}
    labels = {k: x["labels"] for k, x in load(tmp_path, rows).unused.items()}
    assert labels == {"topic": 2, "id": 0, "all": 0, "note": 0, "seldom": 0, "tags": 0}
    said = describe_unused(load(tmp_path, rows, ignored=("note", "id")).unused)
    flag = "--config.data.columns.category=topic"
    assert said[0].endswith(f"; {flag} reports the loss of each of its 2 values")
    assert not any("category" in line for line in said[1:])
    # The rows have one already, under the name of the config or another.
    named = [row | {"category": row["topic"]} for row in rows]
    for columns in ({}, {"category": "all"}):
        unused = load(tmp_path, named, **columns).unused
        assert not any(x["labels"] for x in unused.values()), unused
    old = {"old": {"share": 1.0, "letters": 3, "where": "a:1"}}  # From an older cache.
    assert describe_unused(old) == [
        "old: filled in 100.0% of the rows, 3 letters in a:1"
    ]


def test_the_short_form_of_a_chat_that_was_named_is_marked_and_stops_no_run(tmp_path):
    row = {"instruction": "Only the first?", "response": "Yes.", "turns": CHAT}
    loaded = load(tmp_path, [row] * 12, messages="turns")
    assert loaded.unused["instruction"]["is_material"]
    assert not loaded.unused["response"]["is_material"]
    load(tmp_path, [{"question": "q", "answer": "a", "turns": CHAT}], messages="turns")
    for more in ({"passage": "Ice."}, {"prompt": "Ice."}, {"response": " "}):
        with pytest.raises(UserError, match="the messages in 'turns' must have it"):
            load(tmp_path, [row, {**row, **more}], messages="turns")
    with pytest.raises(UserError, match=r"'instruction' is filled in 2 rows.*jsonl:2"):
        load(
            tmp_path,
            [row, {"instruction": "From this: ice.", "turns": CHAT}],
            messages="turns",
        )
    with pytest.raises(UserError, match="instruction"):
        load(tmp_path, [{"instruction": "Only the first?", "messages": CHAT}] * 12)


def test_an_ignored_column_is_not_read_even_if_it_has_a_default_name(tmp_path):
    row = {**ROW, "context": "Ice floats."}
    (record,) = load(tmp_path, [row], ignored=("context",)).records()
    assert record.context == ""
    with pytest.raises(UserError, match=r"no row has a column 'contexts'.*'context'"):
        load(tmp_path, [row], ignored=("contexts",))


def test_runs_of_earlier_editions_are_told_and_not_stopped(tmp_path):
    facts = load(tmp_path, [{**ROW, "input": "Ice floats."}], edition=2).unused
    assert facts["input"]["is_material"]
    with pytest.raises(UserError, match="input"):
        load(tmp_path, [{**ROW, "input": "Ice floats."}], NEWEST_EDITION + 1)


def test_names_of_material():
    for name in ("Passage", "contexts", "input_text", "chat-history", "TEXT", "text2"):
        assert is_material(name), name
    for name in ("id", "source", "text_length", "input_ids", "category", "url", ""):
        assert not is_material(name), name


def test_a_user_looks_at_texts_whose_names_have_a_word_for_material():
    def looks(name, letters):
        return needs_look(name, {"letters": letters, "is_material": False})

    for name in ("manual_page", "Support-Article", "source_documents", "section 2"):
        assert looks(name, 60) and not looks(name, 40), name
    for name in ("url", "sha256", "author", "pager"):
        assert not looks(name, 64) and looks(name, 200), name
    assert needs_look("x", {"letters": 1, "is_material": True})
