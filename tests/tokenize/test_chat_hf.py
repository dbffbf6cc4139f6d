"""Chats become the ids Hugging Face makes of them, whatever the tokenizer's kind."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from research.tokenize.chat_template import ChatFormat, dolly_template
from research.tokenize.conversation import Record, Turn
from research.tokenize.tokenizer import Tokenizer as Ours
from research.tokenize.tokenizer import from_folder
from research.tokenize.tokenizer_training import save_tokenizer

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TINYLLAMA = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token "
    "+ '\n' }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "Hello there, how are you? [INST] [/INST] user assistant <||>\n 1234 Paris."
] * 4
TURNS = [
    ("user", "Hello there, how are you?"),
    ("assistant", "Paris. 12"),
    ("user", "(are you there?)"),
    ("assistant", "there."),
]


def llama_legacy():
    """Llama 2's and TinyLlama's tokenizer.json: the word mark is a normalizer."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Metaspace()
    return inner


def metaspace():
    """Mistral's newer form: only the start of a text gets a word mark."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace()
    return inner


def byte_level():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def trained(inner):
    # Short merges only: a vocabulary that knows whole sentences proves nothing.
    trainer = BpeTrainer(
        vocab_size=180, special_tokens=CONTROL, max_token_length=4, show_progress=False
    )
    # As in SentencePiece vocabularies, a token has its word mark in front or none,
    # and line breaks stand alone.
    reader = inner.normalizer, inner.pre_tokenizer
    if not isinstance(inner.decoder, decoders.ByteLevel):
        inner.normalizer = normalizers.Replace(" ", "▁")
        words = Regex(r"▁?[^▁\n]+|▁|\n")
        inner.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    inner.train_from_iterator(TEXT, trainer)
    inner.normalizer, inner.pre_tokenizer = reader
    return inner


@pytest.mark.parametrize("kind", [llama_legacy, metaspace, byte_level])
@pytest.mark.parametrize("template", [MISTRAL, TINYLLAMA, CHATML])
@pytest.mark.parametrize("count", [2, 4])
def test_ids_are_those_of_apply_chat_template(kind, template, count):
    inner = trained(kind())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    theirs.chat_template = template
    ours = ChatFormat(
        Ours(inner, bos="<s>", eos="</s>", chat_template=template), "chat"
    )
    turns = tuple(Turn(*turn) for turn in TURNS[:count])
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]

    def reference(messages, prompt):
        text = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
        return inner.encode(text, add_special_tokens=False).ids

    whole = reference(messages, False)
    encoded = ours.encode(Record(turns, "", "", "row"))
    # The text that a template writes after the last end token is dropped.
    assert encoded.ids == whole[: len(encoded.ids)]
    assert len(whole) - len(encoded.ids) <= 2
    prompt = ours.encode_prompt(turns[:-1])
    assert prompt == reference(messages[:-1], True)
    # The answer starts where the prompt ends, and all of it is trained.
    assert encoded.ids[: len(prompt)] == prompt
    assert not encoded.trained[len(prompt) - 1]
    assert all(encoded.trained[len(prompt) :])


@pytest.mark.parametrize("add_bos", [False, True])
def test_an_exported_dolly_template_gives_the_prompts_of_training(add_bos, tmp_path):
    """Other tools prompt a model that was tuned with `template=dolly` as we do."""
    ours = Ours(trained(byte_level()), bos="<s>", eos="</s>", add_bos=add_bos)
    save_tokenizer(ours.with_chat_template(dolly_template(ours)), tmp_path)
    assert from_folder(tmp_path).add_bos == add_bos
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = ChatFormat(ours, "dolly")
    for turns in (TURNS[:1], TURNS[:3], [("system", "Be there"), *TURNS[:3]]):
        messages = [{"role": role, "content": text} for role, text in turns]
        text = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == chat.encode_prompt([Turn(*turn) for turn in turns])
        assert ours.decode(ids, skip_control=False).count("<s>") == add_bos
