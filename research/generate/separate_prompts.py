"""Prompts that have nothing to do with each other, and their answers in order."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from research.core.errors import UserError
from research.core.visible_text import visible
from research.engine.answers.full_answer import FullAnswer
from research.generate.asked_model import AskedModel
from research.generate.chat import show
from research.generate.prompt_file import FilePrompt, text_prompts
from research.tasks.pretraining import PlainFormat
from research.tokenize.conversation import Turn

STANDARD_INPUT = "standard input"


def answer_fields(found: Mapping[str, Sequence[FullAnswer]]) -> dict[str, Any]:
    """The fields of a line of JSON that hold the answers, by model.

    A single model has no name, and a single answer is no list.
    """

    def of_models(values: Mapping[str, Sequence[str]], name: str) -> dict[str, Any]:
        single = {k: v[0] if len(v) == 1 else v for k, v in values.items()}
        return single if len(single) > 1 else {name: next(iter(single.values()))}

    texts = {name: [x.text for x in answers] for name, answers in found.items()}
    ends = {name: [x.finish for x in answers] for name, answers in found.items()}
    finish = of_models(ends, "finish")
    many = len(next(iter(found.values()))) > 1
    return {
        **of_models(texts, "answers" if many else "answer"),
        "finish": finish.get("finish", finish),
    }


def piped_prompts() -> Iterator[FilePrompt]:
    """The lines of standard input that are not empty."""
    return text_prompts(sys.stdin, STANDARD_INPUT)


def single_prompt(text: str) -> FilePrompt:
    """The whole text of standard input or of a flag as a prompt."""
    return FilePrompt(f"{STANDARD_INPUT}:1", {"prompt": text}, (Turn("user", text),))


def require_prompt(model: AskedModel, prompt: FilePrompt) -> None:
    """Raises UserError if a row is no prompt, or none for this model."""
    if prompt.problem:
        raise UserError(prompt.problem)
    if len(prompt.turns) > 1 and isinstance(model.prompts, PlainFormat):
        raise UserError(
            f"it has {len(prompt.turns)} messages, and this model completes a text"
        )


def answer_each(
    model: AskedModel,
    prompts: Iterable[FilePrompt],
    context: str,
    *,
    as_json: bool,
    count: int = 1,
) -> int:
    """Writes the answers to standard output; a prompt that fails leaves the others.

    Args:
      model: answers each prompt by itself. The seed counts up from answer to answer.
      prompts: answered in order, each before the next one is read.
      context: material that belongs to each prompt that has none of its own.
      as_json: writes one JSON object a line, and not the text under a heading.
      count: answers to each prompt.

    Returns:
      How many prompts failed.

    Raises:
      UserError: there is no prompt.
    """
    failed = number = 0
    for number, prompt in enumerate(prompts, start=1):
        try:
            require_prompt(model, prompt)
            seeds = range((number - 1) * count, number * count)
            _answer(model, prompt, prompt.context or context, seeds, as_json)
        except UserError as error:
            failed += 1
            where = prompt.where.replace(f"{STANDARD_INPUT}:", "line ")
            sys.stderr.write(f"error: {where}: {error}\n")
            if as_json:
                _show_json(prompt, {"error": str(error)})
    if not number:
        raise UserError("standard input has no prompt; give one a line, or --prompt")
    return failed


def _answer(
    model: AskedModel,
    prompt: FilePrompt,
    context: str,
    seeds: Sequence[int],
    as_json: bool,
) -> None:
    found: dict[str, list[FullAnswer]] = {name: [] for name in model.generators}
    for name, answers in found.items():
        for number, seed in enumerate(seeds, start=1):
            pieces = model.stream(name, prompt.turns, context, seed)
            if as_json:
                answers.append(FullAnswer.of(pieces))
                continue
            parts = [f"line {prompt.line}", *[name] * (len(found) > 1)]
            parts += [f"answer {number}"] * (len(seeds) > 1)
            show(f"--- {', '.join(parts)}: {visible(prompt.turns[-1].text)}\n")
            for piece in pieces:
                show(piece.text)
            show("\n")
    if as_json:
        _show_json(prompt, answer_fields(found))


def _show_json(prompt: FilePrompt, values: Mapping[str, Any]) -> None:
    line = {"line": prompt.line, **prompt.given, **values}
    # ASCII, because a prompt may hold bytes that are not UTF-8.
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
