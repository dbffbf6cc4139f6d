"""A held-out prompt reaches the report whole: all turns and the row's context."""

import json

from research.config.run_config import Config, DataConfig, EvalConfig, TextConfig
from research.tasks.instruction_tuning import InstructionTask, _prompt_text
from research.tasks.model_answers import lack_of_room
from research.tokenize.conversation import Record, Turn
from research.tokenize.tokenizer_training import byte_tokenizer


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


def test_a_held_out_row_that_leaves_no_room_for_an_answer_is_named(tmp_path):
    rows = [{"instruction": f"Say {i}", "response": "ok"} for i in range(8)]
    rows[5]["instruction"] *= 50
    train, path = tmp_path / "train.jsonl", tmp_path / "rows.jsonl"
    train.write_text(json.dumps({"instruction": "Sing", "response": "la"}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        path=str(train), eval_path=str(path), seq_len=512, template="dolly"
    )
    text = TextConfig(cache_dir=str(tmp_path / "cache"))

    def load(answer, longest, wanted=8):
        own = EvalConfig(max_new_tokens=answer, answers_rows=wanted, prompts=wanted)
        config = Config(data=data, text=text, eval=own)
        task = InstructionTask(config, byte_tokenizer(), longest)
        return len(task.asked()), task.not_asked()

    assert load(8, 512) == (8, [])
    asked, (problem,) = load(8, 256)
    place = f"{path.name}:6: the prompt has "
    assert asked == 7 and place in problem and "context is 256" in problem
    asked, every = load(500, 512)
    assert asked == 0 and len(every) == 8 and "an answer may have 500" in every[0]
    assert load(8, 256, wanted=0) == (0, [])


def test_a_prompt_that_just_fits_lacks_no_room():
    assert not lack_of_room(6, 10, 4) and not lack_of_room(9, 10)
    assert lack_of_room(7, 10, 4).endswith("10: 3 are left, and an answer may have 4")
    assert lack_of_room(10, 10).endswith("10 tokens, and the model's context is 10")
