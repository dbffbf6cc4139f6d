"""One step of a run, read back from its checkpoint."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back.

    Attributes:
      step: optimizer updates it holds.
      state: the tree that was saved, in the shardings of the request.
      position: the data position that `save` was given.
    """

    step: int
    state: Any
    position: dict[str, Any]
