"""A conversation with a reopened run, in the terminal."""

import io
import sys

from research.core.errors import UserError
from research.core.visible_text import visible
from research.engine.sampler import Sampling
from research.runs.reopen import ReopenedRun
from research.tokenize.conversation import Turn


class Conversation:
    """Keeps the turns with each model, and streams its answers."""

    def __init__(self, run: ReopenedRun, sampling: Sampling, *, compare: bool):
        self._prompts = run.prompts
        self._generators = run.generators(compare=compare)
        self._sampling = sampling
        self._history: dict[str, list[Turn]] = {}
        self.forget()

    def forget(self) -> None:
        """Drops all turns."""
        self._history = {name: [] for name in self._generators}

    def say(self, prompt: str, context: str = "") -> None:
        """Streams each model's answer to standard output.

        Raises:
          UserError: the conversation exceeds the model's context, or the prompt is not
            UTF-8.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in prompt + context):
            raise UserError("the prompt has bytes that are not UTF-8; type it again")
        for name, generator in self._generators.items():
            history = self._history[name]
            text = f"{prompt}\n\n{context}" if history and context else prompt
            history.append(Turn("user", text))
            if len(self._generators) > 1:
                _write(f"--- {name}\n")
            first_context = context if len(history) == 1 else ""
            ids = self._prompts.encode_prompt(history, first_context)
            answer = ""
            for piece in generator.stream(ids, self._sampling, self._prompts.stop_ids):
                answer += piece
                _write(piece)
            _write("\n")
            history.append(Turn("assistant", answer.strip()))

    def interact(self) -> None:
        """Reads prompts until the end of input; an empty line drops all turns."""
        interactive = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A line that is not UTF-8 is refused alone, by `say`.
            sys.stdin.reconfigure(errors="surrogateescape")
        while True:
            try:
                line = input("you> " if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                _write("\n")
                return
            if line:
                try:
                    self.say(line)
                    continue
                except UserError as error:
                    _write(f"{error}; the conversation starts again\n")
            self.forget()


def _write(text: str) -> None:
    # A terminal would obey the control characters of an answer.
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
