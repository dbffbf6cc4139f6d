"""A conversation with a model, in the terminal or through a pipe."""

import sys

from research.core.errors import UserError
from research.core.visible_text import visible
from research.generate.asked_model import AskedModel
from research.tokenize.conversation import Turn


class Conversation:
    """Keeps the turns with each model, and streams its answers."""

    def __init__(self, model: AskedModel, context: str = ""):
        """`context` belongs to the first prompt."""
        self._model, self._context = model, context
        self._history: dict[str, list[Turn]] = {}
        self.forget()

    def forget(self) -> None:
        """Drops all turns."""
        self._history = {name: [] for name in self._model.generators}

    def say(self, prompt: str) -> None:
        """Streams each model's answer to standard output.

        Raises:
          UserError: see `AskedModel.stream`.
        """
        for name, history in self._history.items():
            history.append(Turn("user", prompt))
            pieces = self._model.stream(name, history, self._context)
            if len(self._history) > 1:
                show(f"--- {name}\n")
            answer = ""
            for piece in pieces:
                answer += piece.text
                show(piece.text)
            show("\n")
            history.append(Turn("assistant", answer.strip()))

    def interact(self) -> int:
        """Reads prompts until the end of input; an empty line drops all turns.

        Returns how many prompts failed; standard error says why.
        """
        failed = 0
        while True:
            try:
                line = input("you> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                show("\n")
                return failed
            if line:
                try:
                    self.say(line)
                    continue
                except UserError as error:
                    failed += 1
                    reason = visible(f"error: {error}; the conversation starts again")
                    sys.stderr.write(f"{reason}\n")
            self.forget()


def show(text: str) -> None:
    """Writes to standard output at once."""
    # A terminal would obey the control characters of an answer.
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
