"""A conversation with a reopened run, in the terminal."""

import sys

from research.core.errors import UserError
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
          UserError: the conversation exceeds the model's context.
        """
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
                except UserError as error:  # Longer than the model's context.
                    _write(f"{error}; the conversation starts again\n")
            self.forget()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
