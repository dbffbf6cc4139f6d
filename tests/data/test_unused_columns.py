"""Columns that are filled and not used are named; those of material stop the run."""

import json
import re
import shlex

import pytest

from research.config.knob_groups import ColumnsConfig, DataConfig
from research.core.errors import UserError
from research.data.instructions.row_selection import load_rows
from research.data.instructions.unused_columns import is_material

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
    words = shlex.split(message.split("used: ")[1].split("\n")[0])
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
    with pytest.raises(UserError, match=r"rows\.jsonl:2") as caught:
        load(tmp_path, [dict(list(row.items())[:2]), row])
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


def test_columns_that_repeat_the_row_are_only_named(tmp_path):
    whole = "### Instruction:\nWhy is it\nso?\n\n### Response:\nBecause."
    rows = [
        {**ROW, "text": whole, "id": 7, "input": " ", "history": [], "question": None},
        {**ROW, "messages": CHAT},
        {"messages": CHAT, "prompt": "Why is it so?"},
    ]
    facts = load(tmp_path, rows).unused
    assert {name: each["rows"] for name, each in facts.items()} == {
        "text": 1, "id": 1, "messages": 1, "prompt": 1,
    }  # fmt: skip
    assert facts["id"] == {
        "rows": 1, "share": 1 / 3, "where": "rows.jsonl:1", "letters": 1,
        "is_material": False,
    }  # fmt: skip


def test_a_request_beside_a_chat_that_was_named_stops_no_run(tmp_path):
    row = {"instruction": "Only the first?", "response": "Yes.", "turns": CHAT}
    loaded = load(tmp_path, [row] * 12, messages="turns")
    assert not loaded.unused["instruction"]["is_material"]
    with pytest.raises(UserError, match="passage"):
        load(tmp_path, [{**row, "passage": "Ice floats."}] * 12, messages="turns")
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


def test_names_of_material():
    for name in ("Passage", "contexts", "input_text", "chat-history", "TEXT", "text2"):
        assert is_material(name), name
    for name in ("id", "source", "text_length", "input_ids", "category", "url", ""):
        assert not is_material(name), name
