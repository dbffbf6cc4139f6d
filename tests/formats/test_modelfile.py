"""Ollama gets the words that the chat template writes, or the template as it is."""

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
        "# The chat template is the one in the model file.",
    ]
