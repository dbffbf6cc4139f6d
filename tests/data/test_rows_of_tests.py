"""Rows of a test may lack an answer or have several; training refuses both."""

import json

import pytest
from tiny_model import make_tiny_model

from research.config.data_knobs import ColumnsConfig, DataConfig, TextConfig
from research.core.errors import UserError
from research.data.instructions.instruction_dataset import load_dataset
from research.data.instructions.row_columns import to_record
from research.data.row_readers import BadRowError
from research.tokenize.chat_template import ChatFormat
from research.tokenize.tokenizer import from_folder

ASKED = {"instruction": "q"}
USER = [{"role": "user", "content": "q"}]
CHAT = [*USER, {"role": "assistant", "content": ""}]


def read(row, is_test=True, **columns):
    return to_record(row, ColumnsConfig(**columns), "rows:1", is_test=is_test)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (ASKED, {}),
        (ASKED | {"response": ""}, {}),
        (ASKED | {"response": None}, {}),
        (ASKED | {"response": "  \n"}, {}),
        (ASKED | {"response": []}, {}),
        (ASKED | {"response": {"text": [], "answer_start": []}}, {}),
        ({"prompt": "q"}, {}),
        ({"prompt": USER}, {}),
        ({"messages": USER}, {}),
        ({"messages": CHAT}, {}),
        ({"question": "q"}, {"instruction": "question", "response": "answer"}),
        ({"question": "q", "id": 7}, {"instruction": "question", "ignored": ("id",)}),
        (ASKED | {"category": "a", "system": "s", "context": "c"}, {}),
    ],
)
def test_a_row_of_a_test_may_be_a_prompt(row, columns):
    record = read(row, **columns)
    assert not record.has_answer and record.turns[-2].text == "q"
    assert [turn.role for turn in record.turns][-2:] == ["user", "assistant"]
    with pytest.raises(BadRowError):
        read(row, is_test=False, **columns)


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        ("a", ["a"]),
        (["a", "b", "a", " "], ["a", "b"]),
        ({"text": ["b", "ä"], "answer_start": [1, 2]}, ["b", "ä"]),
        ([7, "seven"], ["7", "seven"]),
    ],
)
def test_a_row_of_a_test_may_have_several_answers(given, answers):
    record = read(ASKED | {"answers": given}, response="answers")
    assert [record.turns[-1].text, *record.other_answers] == answers
    if given != "a":
        with pytest.raises(BadRowError, match=r"answers is (list|dict), not text"):
            read(ASKED | {"answers": given}, is_test=False, response="answers")


@pytest.mark.parametrize("row", [ASKED | {"answer": "a"}, {"prompt": "q", "id": 3}])
def test_another_column_may_have_the_answer_so_the_row_is_refused(row):
    [other] = row.keys() - {"instruction", "prompt"}
    with pytest.raises(BadRowError) as bad:
        read(row)
    assert f"columns.response={other}, or" in bad.value.remedy
    assert f"""columns.ignored="('{other}',)\"""" in bad.value.remedy


@pytest.mark.parametrize("given", [[["a"]], {"value": "a"}, [{"text": "a"}]])
def test_answers_of_another_form_are_refused(given):
    with pytest.raises(BadRowError, match=r"answers is (list|dict), not text"):
        read(ASKED | {"answers": given}, response="answers")


def test_prompts_are_rows_without_a_document(tmp_path):
    chat = ChatFormat(from_folder(make_tiny_model(tmp_path / "model")), "dolly")
    file = tmp_path / "rows.jsonl"
    config = DataConfig(path=str(file), held_out=0)
    text = TextConfig(cache_dir=str(tmp_path / "cache"))

    def load(rows, is_test):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_dataset(config, 0, chat, text, is_test=is_test)

    both = [ASKED | {"response": "a"}, ASKED | {"response": ""}]
    tested, trained = load(both, True), load(both, False)
    assert (tested.counts.total, len(tested.train.documents)) == (2, 1)
    assert not tested.examples
    assert (trained.counts.total, len(trained.train.documents)) == (1, 1)
    assert trained.examples == ["rows.jsonl:2: a response is empty"]
    alone = load([ASKED], True)
    assert alone.counts.total == 1 and not alone.train.rows
    with pytest.raises(UserError, match="no column 'response'"):
        load([ASKED], False)
