"""An answer from its first piece to its last."""

import dataclasses
from collections.abc import Iterable

from research.engine.requests import Piece


@dataclasses.dataclass(frozen=True)
class FullAnswer:
    """An answer that is complete.

    Attributes:
      text: of the answer.
      finish: `stop` or `length`.
      tokens: how many there are, its end token among them.
    """

    text: str
    finish: str
    tokens: int

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "FullAnswer":
        """Reads all pieces.

        Raises:
          Exception: what the answer failed with.
        """
        text, tokens, finish = "", 0, ""
        for piece in pieces:
            text += piece.text
            tokens += len(piece.ids)
            finish = piece.finish
        return cls(text, finish, tokens)
