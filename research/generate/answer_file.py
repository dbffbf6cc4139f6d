"""Answers to all prompts of a file, in a file: many at once, in order, resumable."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from research.core.errors import SaveError, UserError
from research.engine.answers.answer_progress import Answer
from research.engine.answers.full_answer import FullAnswer
from research.engine.continuous_batching import Engine
from research.generate.asked_model import AskedModel
from research.generate.prompt_file import USUAL, FilePrompt, PromptColumns, read_prompts
from research.generate.separate_prompts import answer_fields, require_prompt
from research.report.progress_view import AnswerCount
from research.tokenize.conversation import Turn

# Beginnings of prompts that many share, such as a system text, are kept.
PREFIX_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A prompt with its answers by model, or with the reason why it has none."""

    prompt: FilePrompt
    answers: Mapping[str, list[Answer]]
    problem: str


def answer_file(
    model: AskedModel,
    prompts: Path,
    out: Path,
    context: str,
    *,
    columns: PromptColumns = USUAL,
    count: int = 1,
    slots: int = 8,
) -> int:
    """Writes one JSON object a line for each prompt, in the order of the prompts.

    A line is written as soon as it and all before it are known. The same call
    continues after the lines that are there, so a kill costs only what was under way.

    Args:
      model: answers. The seed counts up from answer to answer.
      prompts, columns: see `read_prompts`.
      out: is extended, or begun.
      context: material that belongs to each prompt that has none of its own.
      count: answers to each prompt.
      slots: answers that are made at once.

    Returns:
      How many lines have an error in the place of answers.

    Raises:
      UserError: a file cannot be used, or `out` has lines of other prompts or settings.
    """
    settings = _digest(model, context, count)

    def read() -> Iterator[FilePrompt]:
        return read_prompts(prompts, columns)

    with _opened(out) as file:
        done, failed = _check_written(file, out, read(), settings)
        total, tokens = _measure(model, read(), context)
        if not total:
            raise UserError(f"--prompts={prompts} has no prompt")
        if done == total:
            logging.info("%s has the answers to all %d prompts", out, total)
            return failed
        progress = AnswerCount("prompts", done, total)
        with contextlib.ExitStack() as stack:
            engines = {
                name: stack.enter_context(each.engine(slots, tokens, PREFIX_BYTES))
                for name, each in model.generators.items()
            }
            rest = itertools.islice(enumerate(read()), done, None)
            waiting: collections.deque[_Asked] = collections.deque()
            for number, prompt in rest:
                seeds = range(number * count, (number + 1) * count)
                waiting.append(_submit(model, engines, prompt, context, seeds))
                if len(waiting) > 2 * slots:
                    failed += _write(file, waiting.popleft(), settings, progress)
            while waiting:
                failed += _write(file, waiting.popleft(), settings, progress)
    return failed


@contextlib.contextmanager
def _opened(out: Path) -> Iterator[IO[bytes]]:
    """The file, for this process alone.

    Raises:
      UserError: it cannot be written, or another process writes it.
      SaveError: a line could not be written.
    """
    if out.exists() and not out.is_file():
        raise UserError(f"--out={out} is no file, so no start could continue it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(out, "a+b")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--out={out} is being written by another start") from error
        try:
            yield file
        except OSError as error:
            raise SaveError(
                f"--out={out} could not be written ({error.strerror}); its lines are "
                "kept, and the same command continues",
                step=None,
            ) from error


def _submit(
    model: AskedModel,
    engines: Mapping[str, Engine],
    prompt: FilePrompt,
    context: str,
    seeds: Sequence[int],
) -> _Asked:
    """Puts the requests of a prompt into the queues of all models."""
    answers: dict[str, list[Answer]] = {name: [] for name in engines}
    try:
        require_prompt(model, prompt)
        for seed in seeds:
            request = model.request(prompt.turns, prompt.context or context, seed)
            for name, engine in engines.items():
                answers[name].append(engine.submit(request))
    except UserError as error:
        return _Asked(prompt, {}, str(error))
    return _Asked(prompt, answers, "")


def _write(
    file: IO[bytes], asked: _Asked, settings: str, progress: AnswerCount
) -> bool:
    """Writes the line of a prompt when its answers are there; whether it failed."""
    problem, fields, tokens = asked.problem, {}, 0
    if not problem:
        try:
            found = {
                name: [FullAnswer.of(answer) for answer in answers]
                for name, answers in asked.answers.items()
            }
        except UserError as error:
            problem = str(error)
        else:
            fields = answer_fields(found)
            tokens = sum(x.tokens for each in found.values() for x in each)
    prompt = asked.prompt
    if problem:
        logging.error("%s: %s", prompt.where, problem)
        fields = {"error": f"{prompt.where}: {problem}"}
    line = {"line": prompt.line, **prompt.given, **fields, "settings": settings}
    # ASCII, because a prompt may hold bytes that are not UTF-8.
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()
    progress.add(tokens)
    return bool(problem)


def _check_written(
    file: IO[bytes], out: Path, prompts: Iterator[FilePrompt], settings: str
) -> tuple[int, int]:
    """The lines that are there, and how many of them are errors.

    A last line that a kill has torn is cut off.
    """
    file.seek(0)
    done = failed = end = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        where = f"{out}:{done + 1}"
        try:
            found = json.loads(line)
            written = found["settings"], found["line"], found.get("prompt")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where} is no line of this command ({error!r}); name another --out"
            ) from error
        prompt = next(prompts, None)
        if prompt is None or written[1:] != (prompt.line, prompt.given.get("prompt")):
            raise UserError(
                f"{where} answers another prompt than --prompts has there: name "
                "another --out, or remove it"
            )
        if written[0] != settings:
            raise UserError(
                f"{where} was answered by another model or with other flags: name "
                "another --out, or remove it"
            )
        done, end, failed = done + 1, end + len(line), failed + ("error" in found)
    file.truncate(end)
    if done:
        logging.info("%s has %d answers and is continued", out, done)
    return done, failed


def _measure(
    model: AskedModel, prompts: Iterator[FilePrompt], context: str
) -> tuple[int, int]:
    """How many prompts there are, and the tokens of the longest with its answer."""
    total, longest = 0, 1
    for prompt in prompts:
        total += 1
        if prompt.problem:
            continue
        with contextlib.suppress(UserError):  # It is reported in its turn.
            request = model.request(prompt.turns, prompt.context or context)
            new = request.sampling.max_new_tokens
            longest = max(longest, len(request.prompt) + new)
    return total, longest


def _digest(model: AskedModel, context: str, count: int) -> str:
    """Stands for all that an answer depends on beside its prompt."""
    parts: list[Any] = [
        model.name,
        sorted(model.generators),
        repr(model.sampling),
        model.fits_answers,
        model.stop,
        # Whatever decides how prompts are written, such as the system text.
        model.request([Turn("user", "?")]).prompt,
        context,
        count,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
