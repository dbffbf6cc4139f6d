"""Text from the ids of an answer, as they come: whole characters, and no stop text."""

from collections.abc import Sequence

from research.tokenize.tokenizer import Tokenizer

# More bytes than one character has, and so more tokens than one can be cut into.
LONGEST_CHARACTER = 8


class Detokenizer:
    """Decodes ids one by one. All texts joined equal the decoded ids.

    `tokenizers.decoders.DecodeStream` does the same until an answer ends: it never
    gives the last text if that is no whole character, raises where bytes turn out to
    be none, and decodes all that waits at every token.

    Attributes: none is public. The cost of a token does not grow with the answer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # A text depends on what precedes it: a first word has no space in front.
        self._before: list[int] = []
        self._shown = 0
        self._waiting: list[int] = []
        self._silent = frozenset(
            i for i in tokenizer.control_ids if not tokenizer.decode([i])
        )

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        if token in self._silent:
            return ""
        self._waiting.append(token)
        # Where much waits, the last few tokens tell whether it may wait on.
        last = self._waiting[-LONGEST_CHARACTER:]
        if self._tokenizer.decode(last).endswith("\ufffd"):
            return ""
        text = self._new()
        if text.endswith("\ufffd"):
            return ""
        if text:
            self._before, self._waiting = self._waiting, []
            self._shown = len(self._tokenizer.decode(self._before))
        return text

    def close(self) -> str:
        """The rest, at the end of the answer; incomplete bytes are U+FFFD."""
        return self._new()

    def _new(self) -> str:
        return self._tokenizer.decode(self._before + self._waiting)[self._shown :]


class StopTexts:
    """Ends a text at the first of several texts, wherever its pieces are cut.

    The text that is complete first ends the answer; of two that are complete at once,
    the longer one.
    """

    def __init__(self, stops: Sequence[str]):
        """`stops` are not empty."""
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next text.

        Returns:
          The text that no stop text can begin in, and whether one is complete.
        """
        if not text:
            return "", False
        held = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := held.find(s)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)[1]], True
        kept = min((_start_of(stop, held) for stop in self._stops), default=len(held))
        self._held = held[kept:]
        return held[:kept], False

    def close(self) -> str:
        """The text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _start_of(stop: str, text: str) -> int:
    """Where the longest end of `text` begins that `stop` begins with."""
    first = max(0, len(text) - len(stop) + 1)
    while (first := text.find(stop[0], first)) >= 0:
        if stop.startswith(text[first:]):
            return first
        first += 1
    return len(text)
