"""A Modelfile of Ollama: the model, its chat template as a Go template, and its stops.

Go templates are another language than Jinja. Most chat templates only put words around
the texts of turns; these words are found by rendering, and the result is compared with
the template on other conversations. Where they differ, Ollama is left to the template
that the model file holds.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from research.core.errors import UserError
from research.tokenize.templates.template_process import render_template
from research.tokenize.tokenizer import Tokenizer

SYSTEM, ASKED, ANSWER, AGAIN = "QSYSQ", "QASKQ", "QANSQ", "QAGNQ"
Turns = Sequence[tuple[str, str]]
LINE_END = re.compile(r"[\r\n]")
LEFT_TO_MODEL = "The chat template is the one in the model file."
LEFT_TO_ADAPTED = (
    "Ollama takes the chat template of the base model's file, which may be another one "
    "than the template of training beside this file."
)
NO_SYSTEM = (
    "A Modelfile cannot hold the system text of training: send it with each chat."
)
NO_STOP = "A Modelfile cannot hold a text that ends an answer: stop at"


@dataclasses.dataclass(frozen=True)
class TurnWords:
    """The words of a template in front of and behind each text."""

    begin: str  # of a conversation without a system text
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, turns: Turns) -> str:
        """A prompt for an answer to `turns`."""
        parts = {role: getattr(self, role) for role in ("system", "user", "assistant")}
        text = "" if turns[0][0] == "system" else self.begin
        text += "".join(parts[role][0] + said + parts[role][1] for role, said in turns)
        return text + self.assistant[0]

    def as_go(self) -> str:
        """The Go template, with the names that Ollama gives to its parts."""
        begin, *ends = map(
            _go_text, (self.begin, *self.system, *self.user, *self.assistant)
        )
        before_system, after_system, before_user, after_user, before, after = ends
        return (
            f"{{{{ if .System }}}}{before_system}{{{{ .System }}}}{after_system}"
            f"{{{{ else }}}}{begin}{{{{ end }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{before_user}{{{{ .Content }}}}{after_user}'
            f'{{{{ else if eq .Role "assistant" }}}}{before}{{{{ .Content }}}}{after}'
            f"{{{{ end }}}}{{{{ end }}}}{before}"
        )


def format_modelfile(
    model: str, tokenizer: Tokenizer, system: str = "", adapter: str = ""
) -> str:
    """The text of a Modelfile.

    Args:
      model: the file of the model beside the Modelfile, or the name of the base model.
      tokenizer: has the chat template and the ids that end an answer.
      system: the system text that all training rows had; "" for none.
      adapter: the file of an adapter; "" for none.
    """
    lines = [f"FROM {_place(model)}"]
    if adapter:
        lines.append(f"ADAPTER {_place(adapter)}")
    words = find_words(tokenizer)
    if words and (written := _value(words.as_go())):
        lines.append(f"TEMPLATE {written}")
    elif tokenizer.chat_template:
        lines.append(f"# {LEFT_TO_ADAPTED if adapter else LEFT_TO_MODEL}")
    if system:
        written = _value(system)
        lines.append(f"SYSTEM {written}" if written else f"# {NO_SYSTEM}")
    for end in tokenizer.end_ids:
        text = tokenizer.decode([end], skip_control=False)
        written = _value(text)
        if text:  # Every answer ends in an empty one.
            stop = f"PARAMETER stop {written}" if written else f"# {NO_STOP} {text!a}"
            lines.append(stop)
    return "\n".join(lines) + "\n"


def _value(text: str) -> str:
    """`text` in quotes as Ollama's parser reads it back; "" where it cannot.

    That takes the quotes off and knows no escapes. A value ends with the first line
    that ends in its closing quotes, and characters that cannot be shown are dropped
    (`parser/parser.go` of github.com/ollama/ollama, read in 2026).
    """
    if not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return ""
    if not set(text) & {'"', "\r", "\n"}:
        return f'"{text}"'
    written = f'"""{text}"""'
    begun = [written[: found.start()].rstrip() for found in LINE_END.finditer(written)]
    if any(len(part) >= 6 and part.endswith('"""') for part in begun):
        return ""
    return written


def find_words(tokenizer: Tokenizer) -> TurnWords | None:
    """The words around texts; None where the template does more than write them."""
    if not tokenizer.chat_template:
        return None

    def render(turns: Turns, prompt: bool = True) -> str:
        values = {
            "messages": [{"role": role, "content": said} for role, said in turns],
            "add_generation_prompt": prompt,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
        }
        text = render_template(tokenizer.chat_template, values)
        # llama.cpp then writes this token itself.
        return text.removeprefix(tokenizer.bos_token) if tokenizer.add_bos else text

    user, system, again = ("user", ASKED), ("system", SYSTEM), ("user", AGAIN)
    earlier = (user, ("assistant", ANSWER), again)
    try:
        first, end = _around(render([user], prompt=False), ASKED)
        rest = _around(render([user]), ASKED)[1]
        between = _around(_around(render(earlier), ANSWER)[1], AGAIN)[0]
        before, mid = _around(render([system, user]), SYSTEM)
        after = _around(mid, ASKED)[0]
        ask = _common_end(first, between)
        words = TurnWords(
            begin=first.removesuffix(ask),
            system=(before, _without_end(after, ask)),
            user=(ask, end),
            assistant=(rest.removeprefix(end), _without_end(between, ask)),
        )
        probes = ([user], [system, user], earlier, [system, *earlier])
        same = all(words.render(turns) == render(turns) for turns in probes)
    except (UserError, ValueError):
        return None
    return words if same else None


def _around(text: str, part: str) -> tuple[str, str]:
    """The text in front of and behind `part`. Raises ValueError: it is not there."""
    before, found, after = text.partition(part)
    if not found:
        raise ValueError(part)
    return before, after


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(end)
    return text.removesuffix(end)


def _common_end(one: str, other: str) -> str:
    pairs = zip(reversed(one), reversed(other), strict=False)
    count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[len(one) - count :]


def _place(name: str) -> str:
    """A file as a path, since a bare word would be a model of Ollama's library."""
    return f"./{name}" if name.endswith(".gguf") and "/" not in name else name


def _go_text(text: str) -> str:
    """`text` as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
