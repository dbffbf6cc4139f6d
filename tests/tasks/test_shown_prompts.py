"""A held-out prompt reaches the report whole: all turns and the row's context."""

from research.tasks.instruction_tuning import _prompt_text
from research.tokenize.conversation import Record, Turn


def shown(*turns, context=""):
    turns = tuple(Turn(role, text) for role, text in turns)
    return _prompt_text(
        Record((*turns, Turn("assistant", "An answer.")), context, "", "")
    )


def test_one_turn_is_its_text():
    assert shown(("user", "Why?")) == "Why?"
    assert shown(("user", "Why?"), context="A passage.") == "Why?\n\nA passage."


def test_of_a_chat_every_turn_is_shown_with_its_role():
    chat = (
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "Go"),
    )
    text = "system: Be brief.\n\nuser: Hi\n\nassistant: Yes?\n\nuser: Go"
    assert shown(*chat) == text
    with_context = text.replace("Hi", "Hi\n\nA passage.")
    assert shown(*chat, context="A passage.") == with_context
