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
      last: the id of the last of them; None without any.
    """

    text: str
    finish: str
    tokens: int
    last: int | None = None

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "FullAnswer":
        """Reads all pieces.

        Raises:
          Exception: what the answer failed with.
        """
        text, tokens, finish, last = "", 0, "", None
        for piece in pieces:
            text += piece.text
            tokens += len(piece.ids)
            finish = piece.finish
            last = piece.ids[-1] if piece.ids else last
        return cls(text, finish, tokens, last)
