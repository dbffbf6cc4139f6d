"""Prompts that have nothing to do with each other, and their answers in order."""

import json
import sys
from collections.abc import Iterable, Iterator

from research.core.errors import UserError
from research.core.visible_text import visible
from research.generate.asked_model import AskedModel
from research.generate.chat import show
from research.tokenize.conversation import Turn

Prompt = tuple[int, str]  # The number of its line, counted from 1, and its text.


def piped_prompts() -> Iterator[Prompt]:
    """The lines of standard input that are not empty."""
    for number, line in enumerate(sys.stdin, start=1):
        if line.strip():
            yield number, line.removesuffix("\n")


def answer_each(
    model: AskedModel, prompts: Iterable[Prompt], context: str, *, as_json: bool
) -> int:
    """Writes the answers to standard output; a prompt that fails leaves the others.

    Args:
      model: answers each prompt by itself. The seed counts up from prompt to prompt.
      prompts: answered in order, each before the next one is read.
      context: material that belongs to each of them.
      as_json: writes one JSON object a line, and not the text under a heading.

    Returns:
      How many prompts failed.

    Raises:
      UserError: there is no prompt.
    """
    failed = count = 0
    for count, (number, prompt) in enumerate(prompts, start=1):
        try:
            _answer(model, number, prompt, context, count - 1, as_json)
        except UserError as error:
            failed += 1
            sys.stderr.write(f"error: line {number}: {error}\n")
            if as_json:
                _show_json(number, prompt, {"error": str(error)})
    if not count:
        raise UserError("standard input has no prompt; give one a line, or --prompt")
    return failed


def _answer(
    model: AskedModel, number: int, prompt: str, context: str, seed: int, as_json: bool
) -> None:
    answers = {}
    turns = [Turn("user", prompt)]
    for name in model.generators:
        pieces = model.stream(name, turns, context, seed)
        if as_json:
            answers[name if len(model.generators) > 1 else "answer"] = "".join(pieces)
            continue
        of_model = f", {name}" if len(model.generators) > 1 else ""
        show(f"--- line {number}{of_model}: {visible(prompt)}\n")
        for piece in pieces:
            show(piece)
        show("\n")
    if as_json:
        _show_json(number, prompt, answers)


def _show_json(number: int, prompt: str, values: dict[str, str]) -> None:
    line = {"line": number, "prompt": prompt, **values}
    # ASCII, because a prompt may hold bytes that are not UTF-8.
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
