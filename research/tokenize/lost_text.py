"""How much of a text does not come back from its ids.

A tokenizer may lower capitals, drop letters that it does not know, or lack bytes. A
model then trains on another text than the user gave.
"""

import collections
import dataclasses
from collections.abc import Iterable

from research.tokenize.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LostText:
    """A comparison of texts with what their ids stand for.

    Attributes:
      total: UTF-8 bytes of the texts.
      lost: those of letters that do not come back.
      letters: the letters that are lost most often.
    """

    total: int
    lost: int
    letters: str

    @property
    def share(self) -> float:
        """The share of the bytes that is lost."""
        return self.lost / max(self.total, 1)


def count_lost(tokenizer: Tokenizer, texts: Iterable[str]) -> LostText:
    """Encodes and decodes the texts, and counts letters that are fewer than before."""
    total, lost = 0, collections.Counter[str]()
    for text in texts:
        total += len(text.encode())
        back = tokenizer.read_back(text)
        if back != text:
            lost += collections.Counter(text) - collections.Counter(back)
    size = sum(len(letter.encode()) * n for letter, n in lost.items())
    return LostText(total, size, "".join(letter for letter, _ in lost.most_common(5)))
