"""Ollama gets the words that the chat template writes, or the template as it is."""

import re
import types

import pytest
import tiny_model

from research.formats.base_model import open_base
from research.formats.gguf.modelfile import find_words, format_modelfile
from research.tokenize.chat_template import dolly_template


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modelfile") / "model"
    return open_base(str(tiny_model.make_tiny_model(folder))).tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}" + CHATML
)
# As Gemma: the system text is a part of the first turn.
FOLDED = (
    "{% set ns = namespace(first='') %}{% for m in messages %}{% if m.role == 'system' "
    "%}{% set ns.first = m.content + '\n\n' %}{% else %}<|im_start|>{{ m.role }}\n"
    "{{ ns.first + m.content }}<|im_end|>{% set ns.first = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# It counts the messages.
COUNTING = "{{ messages | length }}" + CHATML


def test_the_words_of_chatml_become_a_go_template(tokenizer):
    own = tokenizer.with_chat_template(CHATML)
    text = format_modelfile("model.gguf", own, 'Be "brief".')
    assert text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n'
        "{{ else }}{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
        "<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'SYSTEM """Be "brief"."""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_a_default_system_text_begins_a_conversation_without_one(tokenizer):
    words = find_words(tokenizer.with_chat_template(DEFAULT_SYSTEM))
    begun = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
    assert words.render([("user", "x")]) == begun + "<|im_start|>assistant\n"
    assert "Be kind" not in words.render([("system", "s"), ("user", "x")])


def test_a_template_in_double_braces_stays_text(tokenizer):
    own = CHATML.replace("<|im_start|>", "{{ '{{' }}")
    words = find_words(tokenizer.with_chat_template(own))
    assert words.render([("user", "x")]).startswith("{{user\nx")
    assert '{{ "{{" }}user\n{{ .Content }}' in words.as_go()


def test_the_headers_of_dolly_have_no_system_text(tokenizer):
    words = find_words(tokenizer.with_chat_template(dolly_template(tokenizer)))
    assert words.user == ("### Instruction:\n", "\n\n")
    assert words.assistant[0] == "### Response:\n"


@pytest.mark.parametrize("template", [FOLDED, COUNTING], ids=["folded", "counting"])
def test_a_template_that_does_more_is_left_to_the_model_file(tokenizer, template):
    own = tokenizer.with_chat_template(template)
    assert find_words(own) is None
    text = format_modelfile("base", own, adapter="./a.gguf")
    assert text.splitlines()[:3] == [
        "FROM base",
        "ADAPTER ./a.gguf",
        "# Ollama takes the chat template of the base model's file, which may be "
        "another one than the template of training beside this file.",
    ]
    alone = format_modelfile("model.gguf", own).splitlines()[1]
    assert alone == "# The chat template is the one in the model file."


def read_as_ollama(text):
    """The commands of a Modelfile, as `ParseFile` of Ollama takes them apart."""
    found, waiting = [], ""
    for part in re.split(r"([\r\n])", text):
        if not waiting and (part in ("\r", "\n", "") or part.startswith("#")):
            continue
        ends = waiting and part in ("\r", "\n")
        name, _, value = waiting.partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        value = value.strip()
        quotes = 3 if value.startswith('"""') else int(value.startswith('"'))
        whole = len(value) >= 2 * quotes and value.endswith('"' * quotes)
        if ends and whole:
            found.append((name, value[quotes : len(value) - quotes]))
            waiting = ""
        else:
            shown = [x for x in part if x.isprintable() or x in "\t\r\n"]
            waiting += "".join(shown)
    assert not waiting
    return found


@pytest.mark.parametrize(
    "text",
    [
        "<|end|>", 'a"b', '"', '""', '"""', "back\\slash", "\n", "\n\nUser:", " x ",
        'say "hi"\nor not', 'ends in "', '"begins', "tab\t", "\u2581\uff5cend\uff5c",
        'code:\n"""\ndoc\n"""\nend', '"""\nx', 'a"""\rb', "zero\u200bwidth",
        "no\u00a0break", "nul\0", "a\r\nb",
    ],
)  # fmt: skip
def test_ollama_reads_a_text_as_it_is_or_a_comment_says_that_it_cannot(text):
    stops = types.SimpleNamespace(
        chat_template="", end_ids=(1,), decode=lambda ids, skip_control: text
    )
    written = format_modelfile("model.gguf", stops, text)
    read = dict(read_as_ollama(written))
    assert read["FROM"] == "./model.gguf"
    said = written.count("# A Modelfile cannot hold")
    if said:
        assert said == 2 and {*read} == {"FROM"}
    else:
        assert read["SYSTEM"] == read["stop"] == text
