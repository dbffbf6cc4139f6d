"""The tokens on which a model and its files are compared."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ProofRows:
    """Rows of tokens; `[B, T]` int32 each, as in a `Batch`. `origin` is for people."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    origin: str

    def within(self, context: int) -> "ProofRows":
        """The same tokens, of which none sees one that is `context` or more before it.

        A document that is longer is cut into several, and positions start anew.
        """
        if not self.positions.size or self.positions.max() < context:
            return self
        pieces = int(self.positions.max()) // context + 1
        number = self.segments * pieces + self.positions // context
        return dataclasses.replace(
            self,
            positions=(self.positions % context).astype(np.int32),
            segments=np.where(self.segments, number, 0).astype(np.int32),
        )
