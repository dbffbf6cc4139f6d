"""Chat templates and tokenizers in the formats of 20 families of models.

All are written for the tests. Each has its family's control tokens, white space,
roles and ways with a system text, a thought and a date; and a tokenizer that cuts
text as the family's does, with merges that reach over the ends of texts.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
from unittest import mock

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as cuts
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from research.tokenize import tokenizer as own_tokenizer
from research.tokenize.chat_template import ChatFormat, read_template_args
from research.tokenize.conversation import Record, Turn

# How Llama 3 splits text before byte-pair encoding, from its tokenizer.json.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4_SPLIT = LLAMA3_SPLIT.replace(r"\s+(?!\S)|\s+", r"\s+(?!\S)|\s")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
WORDS = (
    "How are you? I am well, thank you.\n\nIs it 12345? It is.\n\n\n[INST] [/INST]\n"
    "<<SYS>>\n<</SYS>>\n\n<|user|>\nWhat?\n<|assistant|>\nThis.\n<|system|>\nBe kind.\n"
    "def f(x):\n    return x\n\nToday is 01 January 2026. Ünïcode, ça va?\n"
)


def _byte_level(split=None, *, digits=False):
    inner = Tokenizer(models.BPE())
    steps = [cuts.Digits(individual_digits=True)] if digits else []
    if split:
        steps.append(cuts.Split(Regex(split), "isolated"))
    steps.append(cuts.ByteLevel(add_prefix_space=False, use_regex=split is None))
    inner.pre_tokenizer = cuts.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return _trained(inner, cuts.ByteLevel.alphabet())


def _pieces(kind):
    """SentencePiece: words begin with a mark, and unknown letters are bytes."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = cuts.Split(Regex(r"▁?[^▁\n]+|▁+|\n"), "isolated")
    _trained(inner, [], ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    # Bytes are ordinary pieces; only the trainer called them special.
    rules = json.loads(inner.to_str())
    rules["added_tokens"] = rules["added_tokens"][:1]
    inner = Tokenizer.from_str(json.dumps(rules))
    inner.pre_tokenizer = None
    if kind == "legacy":  # Llama 2, Phi-3: every stretch of text gets a mark.
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(marks)
    elif kind == "first":  # Mistral: only the beginning gets one.
        inner.normalizer = None
        inner.pre_tokenizer = cuts.Metaspace(prepend_scheme="first", split=False)
    else:  # Gemma: none.
        inner.pre_tokenizer = cuts.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return inner


def _trained(inner, alphabet, first=()):
    trainer = BpeTrainer(
        vocab_size=600, initial_alphabet=list(alphabet), special_tokens=list(first),
        max_token_length=8, show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([WORDS] * 4, trainer)
    return inner


CUTS = {
    "smollm": functools.partial(_byte_level, digits=True),
    "llama3": functools.partial(_byte_level, LLAMA3_SPLIT),
    "gpt4": functools.partial(_byte_level, GPT4_SPLIT),
    "qwen": functools.partial(_byte_level, QWEN_SPLIT),
    "legacy": functools.partial(_pieces, "legacy"),
    "first": functools.partial(_pieces, "first"),
    "gemma": functools.partial(_pieces, "gemma"),
}


@functools.cache
def _rules(cut):
    return CUTS[cut]().to_str()


@dataclasses.dataclass(frozen=True)
class ChatFamily:
    """One family.

    Attributes:
      template: Jinja.
      cut: how its tokenizer cuts text.
      control: its special tokens; the last one ends an answer.
      bos: the first token, or None.
      eos: the end of a text, if that is not the end of an answer.
      plain: added tokens that are not special.
      rstrip: whether its control tokens take in the white space behind them.
      system: whether it takes a system text, anywhere.
      args: variables that are set.
    """

    template: str
    cut: str
    control: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None
    plain: tuple[str, ...] = ()
    rstrip: bool = False
    system: bool = True
    args: tuple[str, ...] = ()

    def tokenizer(self):
        inner = Tokenizer.from_str(_rules(self.cut))
        inner.add_tokens(
            [
                AddedToken(name, special=True, normalized=False, rstrip=self.rstrip)
                for name in self.control
            ]
        )
        inner.add_tokens([AddedToken(name, normalized=False) for name in self.plain])
        return inner


def chatml(default="", answer="m.content", opening=""):
    """ChatML with a default system text, and words around an answer."""
    system = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\n" + default
        + "<|im_end|>\n{% endif %}"
    )  # fmt: skip
    return (
        (system if default else "")
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == "
        "'assistant' %}{{ " + answer + " }}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}" + opening + "{% endif %}"
    )


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = "
    "messages[0].content | trim %}{% set rest = messages[1:] %}{% else %}"
    "{% set said = '' %}{% set rest = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>{{ '\n\n' }}Knowledge ends: May 2024"
    "{{ '\n' }}Today: {{ DAY }}{{ '\n\n' }}{{ said }}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
)
# The system text stands in the last message of the user.
MISTRAL = (
    "{% set ns = namespace(said='', last='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.said = m.content + '\n\n' %}{% endif %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]SPACE' + (ns.said if loop.index0 == ns.last else '') + m.content "
    "+ '[/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ 'SPACE' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}SYSTEM{% endif %}"
    "{% for m in messages if m.role != 'system' %}<start_of_turn>{{ 'model' if m.role "
    "== 'assistant' else m.role }}{{ '\n' }}{% if loop.first and said %}{{ said }}"
    "{{ '\n\n' }}{% endif %}{{ m.content | trim }}<end_of_turn>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
)
NO_SYSTEM = "{{ raise_exception('no system role here') }}"
THINKING = (
    "{%- for m in messages %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in content %}{%- set thought = "
    "content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{%- set content = "
    "content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>' + "
    "m.role + '\n' }}{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n' + "
    "thought + '\n</think>\n\n' }}{%- endif %}{{- content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
PIECES = ("<s>", "</s>")
BRACKETS = ("<s>", "[INST]", "[/INST]", "</s>")
TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")

FAMILIES = {
    "chatml": ChatFamily(chatml(), "smollm", CHATML),
    "smollm2": ChatFamily(chatml("You help."), "smollm", CHATML),
    "smollm3": ChatFamily(
        chatml("Mode: /no_think", "'<think>\n\n</think>\n' + m.content",
               "{{ '<think>\n\n</think>\n' }}"),
        "llama3", CHATML, plain=("<think>", "</think>"),
    ),
    "qwen2.5": ChatFamily(chatml("You are Q."), "qwen", CHATML),
    "qwen3": ChatFamily(THINKING, "qwen", CHATML, plain=("<think>", "</think>")),
    "qwen3 without thoughts": ChatFamily(
        THINKING, "qwen", CHATML, plain=("<think>", "</think>"),
        args=("enable_thinking=False",),
    ),
    "hermes": ChatFamily(
        chatml("Call tools as <tool_call>{}</tool_call>."), "llama3", CHATML,
        plain=("<tool_call>", "</tool_call>"),
    ),
    "llama2": ChatFamily(
        "{% if messages[0].role == 'system' %}{% set said = '<<SYS>>\n' + "
        "messages[0].content + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
        "(said if loop.first else '') + m.content | trim + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        "legacy", PIECES, bos="<s>",
    ),
    "llama3.1": ChatFamily(
        LLAMA3.replace("DAY", "date_string if date_string is defined else '26 Jul'"),
        "llama3", HEADERS, bos="<|begin_of_text|>", args=("date_string=27 Nov 2026",),
    ),
    "llama3.2": ChatFamily(
        LLAMA3.replace("DAY", "strftime_now('%d %b %Y')"), "llama3", HEADERS,
        bos="<|begin_of_text|>",
    ),
    "mistral v1": ChatFamily(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + "
        "m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + "
        "eos_token }}{% else %}{{ raise_exception('user and assistant only') }}"
        "{% endif %}{% endfor %}",
        "first", PIECES, bos="<s>", system=False,
    ),
    "mistral v2": ChatFamily(
        MISTRAL.replace("SPACE", " "), "first", BRACKETS, bos="<s>"
    ),
    "mistral v3": ChatFamily(
        MISTRAL.replace("SPACE", ""), "gpt4", BRACKETS, bos="<s>"
    ),
    "gemma 2": ChatFamily(
        GEMMA.replace("SYSTEM", NO_SYSTEM), "gemma", TURNS, bos="<bos>", eos="<eos>",
        plain=("\n\n", "\n\n\n"), system=False,
    ),
    "gemma 3": ChatFamily(
        GEMMA.replace("SYSTEM", "{% set said = messages[0].content %}"), "gemma",
        TURNS, bos="<bos>", eos="<eos>", plain=("\n\n", "\n\n\n"),
    ),
    "phi-3": ChatFamily(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
        "{{ eos_token }}{% endif %}",
        "legacy",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>", rstrip=True,
    ),
    "phi-4": ChatFamily(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
        "<|im_sep|>{% endif %}",
        "gpt4", ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        eos="<|endoftext|>",
    ),
    "olmo 2": ChatFamily(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last %}"
        "{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '\n<|assistant|>\n' }}{% endif %}",
        "gpt4", ("<|endoftext|>",), bos="<|endoftext|>",
    ),
    "granite": ChatFamily(
        "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>"
        "Today is {{ strftime_now('%d %B %Y') }}.<|end_of_text|>{{ '\n' }}{% endif %}"
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>"
        "{{ m.content }}<|end_of_text|>{{ '\n' }}{% endfor %}{% if "
        "add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        "smollm", ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
    "deepseek-r1 distilled": ChatFamily(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<User>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}",
        "llama3", ("<begin>", "<end-of-answer>"), bos="<begin>",
        plain=("<User>", "<Assistant>", "<think>", "</think>"),
    ),
    "zephyr": ChatFamily(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + "
        "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% endif %}",
        "first", PIECES, bos="<s>",
    ),
}  # fmt: skip


class FixedDay(datetime.datetime):
    """The day that templates see here."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1, tzinfo=tz)


class ChatFamily:
    """A family's format here, and the tokenizer of transformers."""

    def __init__(self, name):
        self.name = name
        self.facts = facts = FAMILIES[name]
        eos = facts.eos or facts.control[-1]
        inner = facts.tokenizer()
        self.tokenizer = own_tokenizer.Tokenizer(
            facts.tokenizer(), bos=facts.bos, eos=eos, chat_template=facts.template
        )
        self.chat = ChatFormat(self.tokenizer, "chat", written_args=facts.args)
        self._theirs = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token=facts.bos, eos_token=eos
        )
        self._theirs.chat_template = facts.template
        self._args = read_template_args(facts.template, facts.args)
        self._inner = inner

    def theirs(self, turns, prompt):
        """The ids of `apply_chat_template`."""
        messages = [{"role": role, "content": text} for role, text in turns]
        text = self._theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False, **self._args
        )
        return self._inner.encode(text, add_special_tokens=False).ids

    def ours(self, turns):
        return self.chat.encode(
            Record(tuple(itertools.starmap(Turn, turns)), "", "", "")
        )

    def prompt(self, turns):
        return self.chat.encode_prompt([Turn(*turn) for turn in turns])

    def trained_texts(self, encoded):
        runs = itertools.groupby(
            zip(encoded.ids, encoded.trained, strict=True), key=lambda pair: pair[1]
        )
        return [
            self.tokenizer.decode([i for i, _ in run], skip_control=False)
            for trained, run in runs
            if trained
        ]


@contextlib.contextmanager
def on_a_fixed_day():
    """Templates of transformers see the day that ours see."""
    with mock.patch.object(chat_template_utils, "datetime", FixedDay):
        yield


def folded(turns):
    (_, system), (_, first), *rest = turns
    return [("user", f"{system}\n\n{first}"), *rest]


def check_answers(family, turns, whole, encoded):
    """Exactly the answers are trained, each with its end.

    Not one that the template writes in history otherwise than it asks for it. `whole`:
    the conversation's ids in transformers.
    """
    expected = []
    for end, (role, text) in enumerate(turns):
        asked = family.theirs(turns[:end], True) if role == "assistant" else []
        as_asked = whole[: len(asked)] == asked
        if role == "assistant" and (as_asked or end == len(turns) - 1):
            expected.append(text.rpartition("</think>")[2].strip())
    end = family.facts.control[-1]
    trained = family.trained_texts(encoded)
    assert all(text.endswith(end) for text in trained)
    found = [
        text.rpartition("</think>")[2].strip().removesuffix(end).strip()
        for text in trained
    ]
    assert found == expected
