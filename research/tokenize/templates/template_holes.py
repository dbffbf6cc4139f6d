"""Holes in place of texts, so that a template can be cut without any row's text."""

import dataclasses
import re
from collections.abc import Sequence

from research.tokenize.conversation import Turn
from research.tokenize.tokenizer import Tokenizer

# Private-use characters mark the holes while a template is rendered.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
HOLE = re.compile(f"({OPEN}[0-9.]+{CLOSE})")
THOUGHT = re.compile(r"</?(?:think|thinking|thought|reasoning)>")
# A text that a template looks for, in `'x' in content` or `content.split('x')`.
LOOKED_FOR = re.compile(
    r"(?P<q>['\"])(?P<sought>[^'\"]+)(?P=q)\s+(?:not\s+)?in\b|"
    r"\b(?:split|startswith|endswith|replace|partition|removeprefix|removesuffix|find)"
    r"\(\s*(?P<p>['\"])(?P<argument>[^'\"]+)(?P=p)"
)
SHORTEST = 3  # letters; shorter ones would be all over the texts


class TextHider:
    """Hides the texts of turns, except for what their template looks for.

    Templates cut white space off a text, and look for marks such as `</think>` in an
    answer or `/no_think` in a system text. These stay in sight.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        """`source`: of the template."""
        self._tokenizer = tokenizer
        found = (m["sought"] or m["argument"] for m in LOOKED_FOR.finditer(source))
        texts = {text.replace("\\n", "\n").strip() for text in found}
        marks = [t for t in texts if len(t) >= SHORTEST and not t.isidentifier()]
        # The longest first: one can be the beginning of another.
        wanted = [re.escape(mark) for mark in sorted(marks, key=len, reverse=True)]
        self._seen = re.compile(f"({'|'.join([*wanted, THOUGHT.pattern])})")

    def hide(self, turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], dict[str, str]]:
        """The turns with holes in place of their texts, and the texts by hole."""
        texts: dict[str, str] = {}
        hidden = []
        for index, turn in enumerate(turns):
            form, own = self._form(turn, index)
            texts |= own
            hidden.append(dataclasses.replace(turn, text=form))
        return tuple(hidden), texts

    def _form(self, turn: Turn, index: int) -> tuple[str, dict[str, str]]:
        pieces = self._seen.split(turn.text)
        if len(pieces) > 1:
            form, own = _with_holes(pieces, index)
            # Marks may not add up to a control token, and an answer that is nothing
            # but thoughts is their text.
            added = {token[0] for token in self._tokenizer.find_added(form)}
            answered = turn.role != "assistant" or pieces[-1].strip()
            if answered and not added & self._tokenizer.control_ids:
                return form, own
        return _with_holes([turn.text], index)


def _with_holes(pieces: Sequence[str], index: int) -> tuple[str, dict[str, str]]:
    """Pieces with holes in place of every other one; white space around it remains."""
    form, own = list(pieces), {}
    for part in range(0, len(pieces), 2):
        text = pieces[part].strip()
        if text:
            hole = f"{OPEN}{index}.{part}{CLOSE}"
            before, _, behind = pieces[part].partition(text)
            form[part], own[hole] = f"{before}{hole}{behind}", text
    return "".join(form), own
