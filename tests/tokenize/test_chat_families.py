"""Twenty families' chats become the ids that transformers makes, and right masks."""

import dataclasses
import itertools
import json

import pytest
from chat_families import (
    FAMILIES,
    ChatFamily,
    check_answers,
    folded,
    on_a_fixed_day,
)
from transformers import PreTrainedTokenizerFast

from research.config.run_config import Config, DataConfig, TextConfig
from research.core.errors import UserError
from research.tasks.instruction_tuning import InstructionTask
from research.tokenize.chat_template import (
    ChatFormat,
    dolly_template,
    read_template_args,
    with_template_args,
)
from research.tokenize.conversation import Record, Turn
from research.tokenize.default_system import DEFAULT_SYSTEM, with_default_system
from research.tokenize.templates.template_process import render_template
from research.tokenize.tokenizer import Tokenizer, from_folder
from research.tokenize.tokenizer_training import save_tokenizer

SYSTEM = ("system", "Answer briefly; é.")
ONE = [("user", "Is it 12345?\n\nSay so."), ("assistant", "It is.\n\n\nYes (7)?")]
SEVERAL = [
    *ONE,
    ("user", "{x: 1}?"),
    ("assistant", "<tool_call>\n{}\n</tool_call> done..."),
    ("user", "And code?\n"),
    ("assistant", "    return x  # ça\n\n    y"),
]
MORE = ("", " with system")
CHATS = {
    "one": ONE,
    "one with system": [SYSTEM, *ONE],
    "several": SEVERAL,
    "several with system": [SYSTEM, *SEVERAL],
}
# Here the prompt of transformers is not how its whole conversation begins. Ours begins
# with the prompt, which is all that a model sees when it is asked.
UNLIKE_THE_PROMPT = {
    # The line break of the prompt and the indentation of the answer are one token.
    *((name, f"several{more}") for name in ("chatml", "smollm2") for more in MORE),
    # The template opens a thought only in the prompt.
    *(("deepseek-r1 distilled", chat) for chat in CHATS),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    with on_a_fixed_day():
        yield ChatFamily(request.param)


@pytest.mark.parametrize("chat", CHATS)
def test_ids_and_masks_are_those_of_transformers(family, chat):
    turns = CHATS[chat]
    reference = turns
    if not family.facts.system and turns[0][0] == "system":
        reference = folded(turns)
    encoded, prompt = family.ours(turns), family.prompt(turns[:-1])
    assert prompt == family.theirs(reference[:-1], True)
    assert encoded.ids[: len(prompt)] == prompt, "training sees what will be asked"
    assert not encoded.trained[len(prompt) - 1]
    assert all(encoded.trained[len(prompt) :])
    whole = family.theirs(reference, False)
    if (family.name, chat) not in UNLIKE_THE_PROMPT:
        # Words of a template behind the last end are dropped.
        assert encoded.ids == whole[: len(encoded.ids)]
        assert len(whole) - len(encoded.ids) <= 2
    else:
        assert whole[: len(prompt)] != prompt
    check_answers(family, reference, whole, encoded)


BLOCKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == "
    "'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_the_mask_of_generation_blocks_is_that_of_transformers():
    facts = dataclasses.replace(FAMILIES["qwen2.5"], template=BLOCKS)
    chat = ChatFormat(
        Tokenizer(facts.tokenizer(), bos=None, eos="<|im_end|>", chat_template=BLOCKS),
        "chat",
    )
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=facts.tokenizer(), eos_token="<|im_end|>"
    )
    theirs.chat_template = BLOCKS
    for turns in CHATS.values():
        found = theirs.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns],
            return_dict=True, return_assistant_tokens_mask=True,
        )  # fmt: skip
        ours = chat.encode(Record(tuple(itertools.starmap(Turn, turns)), "", "", ""))
        count = len(ours.ids)
        assert ours.ids == found["input_ids"][:count]
        assert ours.trained == [bool(m) for m in found["assistant_masks"][:count]]
        assert not any(found["assistant_masks"][count:])


def test_a_family_has_the_history_that_its_template_writes():
    """Only two formats here cannot train all answers of a conversation."""
    families = [ChatFamily(name) for name in FAMILIES]
    counts = {f.name: len(f.trained_texts(f.ours(SEVERAL))) for f in families}
    less = {name for name, count in counts.items() if count != 3}
    assert less == {"qwen3 without thoughts", "deepseek-r1 distilled"}


def test_a_thought_is_trained_where_the_prompt_opens_one():
    r1 = ChatFamily("deepseek-r1 distilled")
    thought = [("user", "2+2?"), ("assistant", "<think>\nTwo twos.\n</think>\n\n4")]
    assert r1.trained_texts(r1.ours(thought)) == [
        "Two twos.\n</think>\n\n4<end-of-answer>"
    ]
    plain = [("user", "2+2?"), ("assistant", "4")]
    assert r1.trained_texts(r1.ours(plain)) == ["\n</think>\n\n4<end-of-answer>"]
    assert r1.ours(plain).ids[: len(r1.prompt(plain[:1]))] == r1.prompt(plain[:1])


def test_a_thought_of_the_past_is_gone_as_the_template_says():
    qwen = ChatFamily("qwen3")
    turns = [
        ("user", "2+2?"), ("assistant", "<think>\nTwos.\n</think>\n\n4"),
        ("user", "3+3?"), ("assistant", "<think>Threes.</think>6"),
    ]  # fmt: skip
    encoded = qwen.ours(turns)
    assert encoded.ids == qwen.theirs(turns, False)[: len(encoded.ids)]
    assert qwen.trained_texts(encoded) == [
        "4<|im_end|>", "<think>\nThrees.\n</think>\n\n6<|im_end|>",
    ]  # fmt: skip
    bare = qwen.ours([("user", "2+2?"), ("assistant", "4")])
    assert qwen.trained_texts(bare) == ["<think>\n\n</think>\n\n4<|im_end|>"]


def test_plain_added_tokens_are_whole_and_special_ones_are_letters():
    for name in ("hermes", "qwen3", "deepseek-r1 distilled"):
        tokenizer = ChatFamily(name).tokenizer
        facts = FAMILIES[name]
        for plain in facts.plain:
            (ids,) = tokenizer.encode_texts([plain])
            assert len(ids) == 1 and ids[0] not in tokenizer.control_ids
        for control in facts.control:
            (ids,) = tokenizer.encode_texts([control])
            assert not set(ids) & tokenizer.control_ids
            assert tokenizer.decode(ids) == control


def test_a_variable_of_the_template_is_set_or_named():
    template = FAMILIES["qwen3"].template
    assert read_template_args(template, ("enable_thinking=False",)) == {
        "enable_thinking": False
    }
    assert read_template_args("{{ day }}", ("day=26 Jul 2024",)) == {
        "day": "26 Jul 2024"
    }
    with pytest.raises(UserError, match="did you mean 'enable_thinking'"):
        read_template_args(template, ("enable_thinkin=False",))
    for wrong in ("enable_thinking", "messages=1", "a b=1"):
        with pytest.raises(UserError, match="must be name=value"):
            read_template_args(template, (wrong,))


def test_other_tools_prompt_with_the_variables_of_training():
    quiet = ChatFamily("qwen3 without thoughts")
    turns = [("user", "2+2?")]
    theirs = ChatFamily("qwen3")
    theirs._theirs.chat_template = with_template_args(
        quiet.facts.template, quiet.facts.args
    )
    assert theirs.theirs(turns, True) == quiet.prompt(turns)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "mistral v1", "gemma 2"])
def test_an_export_asks_with_the_system_text_of_training(name):
    """Other tools, and `generate --model=EXPORT`, as the run itself."""
    system = "Say \"it's\" ü 🙂 {{ x }} {% y %} 'q' in\n\\n briefly."
    family = ChatFamily(name)
    facts = family.facts
    trained = ChatFormat(family.tokenizer, "chat", system, facts.args)
    template = with_default_system(facts.template, system, trained.takes_system)
    family._theirs.chat_template = template
    exported = ChatFormat(
        family.tokenizer.with_chat_template(template), "chat", "", facts.args
    )
    for turns in (SEVERAL[:1], SEVERAL[:3], [SYSTEM, *SEVERAL[:3]]):
        expected = trained.encode_prompt([Turn(*turn) for turn in turns])
        assert family.theirs(turns, True) == expected
        assert exported.encode_prompt([Turn(*turn) for turn in turns]) == expected
    none = ChatFormat(
        family.tokenizer.with_chat_template(template), "chat", "",
        (*facts.args, f"{DEFAULT_SYSTEM}="),
    )  # fmt: skip
    turns = [Turn(*SEVERAL[0])]
    assert none.encode_prompt(turns) == family.chat.encode_prompt(turns)
    # An export that was tuned further has the newer text.
    newer = with_default_system(template, "Newer.", True)
    chat = ChatFormat(
        family.tokenizer.with_chat_template(newer), "chat", "", facts.args
    )
    own = ChatFormat(family.tokenizer, "chat", "Newer.", facts.args)
    assert chat.encode_prompt(turns) == own.encode_prompt(turns)


@pytest.mark.parametrize("start", ["\n", "\n\n ", "   {% if messages %}{% endif %}"])
@pytest.mark.parametrize("name", ["qwen3 without thoughts", "mistral v1"])
def test_an_exported_template_begins_as_in_training(name, start):
    """A line end or an indent at its beginning is not lost or kept by what we add."""
    family = ChatFamily(name)
    template = start + family.facts.template
    args = family.facts.args
    own = family.tokenizer.with_chat_template(template)
    trained = ChatFormat(own, "chat", "Help.", args)
    family._theirs.chat_template = with_default_system(
        with_template_args(template, args), "Help.", trained.takes_system
    )
    expected = trained.encode_prompt([Turn(*SEVERAL[0])])
    assert family.theirs(SEVERAL[:1], True) == expected


@pytest.mark.parametrize("takes_system", [True, False])
def test_an_exported_template_takes_what_the_own_one_takes(takes_system):
    """No messages, and messages in parts."""
    family = ChatFamily("chatml")
    parts = (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% endif %};{% endfor %}"
    )
    family._theirs.chat_template = with_default_system(parts, "S", takes_system)

    def render(*messages):
        return family._theirs.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
        )

    def listed(text):
        return [{"type": "text", "text": text}]

    empty = {"messages": [], "add_generation_prompt": False}
    assert render_template(family._theirs.chat_template, empty) == ""
    whole = "system:S;user:q;" if takes_system else "user:S\n\nq;"
    assert render(("user", "q")) == render(("user", listed("q"))) == whole
    for system in ("S", listed("S")):
        for question in ("q", listed("q")):
            assert render(("system", system), ("user", question)) == whole
    assert render(("system", "S")) == "system:S;"


@pytest.mark.parametrize("name", ["chatml", "llama3.1", "mistral v1"])
def test_an_exported_dolly_template_gives_the_prompts_of_training(name, tmp_path):
    """Other tools prompt a model that was tuned with `template=dolly` as we do."""
    facts = FAMILIES[name]
    eos, add_bos = facts.control[-1], facts.bos is not None
    ours = Tokenizer(facts.tokenizer(), bos=facts.bos, eos=eos, add_bos=add_bos)
    save_tokenizer(ours.with_chat_template(dolly_template(ours)), tmp_path)
    assert from_folder(tmp_path).add_bos == add_bos
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = ChatFormat(ours, "dolly")
    for turns in (SEVERAL[:1], SEVERAL[:3], [SYSTEM, *SEVERAL[:3]]):
        messages = [{"role": role, "content": text} for role, text in turns]
        text = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == chat.encode_prompt([Turn(*turn) for turn in turns])
        assert ids[:1] == [ours.bos] or not add_bos


def test_a_prompt_in_other_words_is_refused_with_both():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>helper: {% endif %}"
    )
    inner = FAMILIES["chatml"].tokenizer()
    tokenizer = Tokenizer(inner, bos=None, eos="<|im_end|>", chat_template=template)
    with pytest.raises(UserError, match=r"helper: .*<.im_start.>assistant: "):
        ChatFormat(tokenizer, "chat")


def test_a_system_text_without_a_role_is_said_once(caplog):
    gemma = ChatFamily("gemma 2")
    for _ in range(3):
        gemma.ours(CHATS["one with system"])
    notes = [r.message for r in caplog.records if "no system role" in r.message]
    assert len(notes) == len(gemma.chat.notes) == 1


def test_the_doctor_shows_what_the_template_does(tmp_path):
    chat = CHATS["one with system"]
    messages = [{"role": role, "content": text} for role, text in chat]
    lines = [
        json.dumps({"messages": [*messages[:-1], {**messages[-1], "content": f"{n}"}]})
        for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), seq_len=256, held_out=2)
    config = Config(data=data, text=TextConfig(cache_dir=str(tmp_path / "cache")))
    for _ in range(2):  # The second reads the rows from the cache.
        task = InstructionTask(config, ChatFamily("gemma 2").tokenizer, 512)
        shown = {finding.name: finding.text for finding in task.examine()}
        assert "no system role" in shown["chat template"]
        assert shown["tokenizer round trip"].startswith("all of ")
