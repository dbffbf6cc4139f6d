"""Any chat, in the formats of twenty families, is what transformers makes of it."""

import pytest
from chat_families import (
    FAMILIES,
    ChatFamily,
    check_answers,
    folded,
    on_a_fixed_day,
)

from research.core.errors import UserError

pytest.importorskip("hypothesis")  # tests/requirements.txt has it.

from hypothesis import given, settings
from hypothesis import strategies as st

BITS = (
    "a", " ", "  ", "\n", "\n\n", "\t", "é", "日本", "?", "!", ".", "123", "<|usr|>\n",
    "<tool_call>", "{", "'s", " the", "\\n", "\u3000", "\r\n", "_", "<|", "|>", "🙂",
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    with on_a_fixed_day():
        yield ChatFamily(request.param)


@st.composite
def chats(draw):
    """Texts without names of control tokens, which transformers parses in texts.

    Answers have no white space in front, which can be one token with the prompt's.
    """
    letters = st.characters(exclude_categories=["Cs"])
    words = st.lists(st.sampled_from(BITS) | letters, max_size=12).map("".join)

    def text(role):
        return f"{draw(words)}q" if role == "user" else f"A{draw(words)}q"

    roles = ["system"] * draw(st.integers(0, 1))
    roles += ["user", "assistant"] * draw(st.integers(1, 3))
    turns = [(role, text(role)) for role in roles]
    if draw(st.integers(0, 2)) == 0:
        begin = draw(st.sampled_from(["", "\n"]))
        thought = f"<think>{begin}{text('user')}\n</think>\n\n"
        turns[-1] = ("assistant", thought + turns[-1][1])
    return turns


def check_chat(family, turns):
    """The prompt, the conversation and its marks are those of transformers."""
    reference = turns
    if not family.facts.system and turns[0][0] == "system":
        reference = folded(turns)
    prompt = family.prompt(turns[:-1])
    asked = family.theirs(reference[:-1], True)
    assert prompt == asked
    if "<think>" in turns[-1][1] and family.name == "qwen3 without thoughts":
        with pytest.raises(UserError, match="asks for an answer with"):
            family.ours(turns)
        return
    encoded = family.ours(turns)
    assert encoded.ids[: len(prompt)] == prompt
    assert all(encoded.trained[len(prompt) :])
    whole = family.theirs(reference, False)
    if whole[: len(asked)] == asked:
        assert encoded.ids == whole[: len(encoded.ids)]
    check_answers(family, reference, whole, encoded)


@settings(max_examples=4, deadline=None, database=None, derandomize=True)
@given(chats())
def test_any_chat_has_the_ids_and_marks_of_transformers(family, turns):
    check_chat(family, turns)


@pytest.mark.soak
@settings(max_examples=200, deadline=None, database=None)
@given(chats())
def test_many_chats_have_the_ids_and_marks_of_transformers(family, turns):
    check_chat(family, turns)
