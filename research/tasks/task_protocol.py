"""What a training run asks of its job: the only things in which jobs differ."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from research.data.batch_order import Batches
from research.data.token_batch import Batch
from research.engine.text_generation import Model
from research.tokenize.conversation import Turn
from research.train.doctor import Finding


class PromptFormat(Protocol):
    """How a prompt becomes ids, and where an answer ends."""

    stop_ids: frozenset[int]

    def encode_prompt(self, turns: Sequence[Turn], context: str = "") -> list[int]: ...


class Task(Protocol):
    """One job: its rows, and what it shows of them and of the model.

    Attributes:
      groups: what `Batch.groups` numbers: categories, sources.
      origin: where the rows are from, for people.
      sha256: of the rows, to tell one data set from another.
      left_out: `where: why` of everything that is not trained whole.
      held_out_bytes: UTF-8 bytes of the held-out text by group, where it is text.
    """

    groups: Sequence[str]
    origin: str
    sha256: str
    left_out: Sequence[str]
    held_out_bytes: Mapping[str, int]

    def batches(self, mine: Sequence[int]) -> Batches:
        """Training batches; `mine` are this process's rows of each."""

    def held_out(self, rows: int, mine: Sequence[int]) -> list[Batch]:
        """Every held-out row once, in batches of `rows`."""

    def examine(self) -> list[Finding]:
        """What the doctor says of the rows."""

    def show_first_row(self, console: Console) -> None:
        """The first packed row as text."""

    def sample(self, step: int, model: Model, folder: Path) -> None:
        """Called now and then with the model so far."""

    def conclude(
        self,
        console: Console,
        base: Callable[[], Model | None],
        model: Model,
        folder: Path,
    ) -> list[str]:
        """Shows what the model says at the end; returns it as lines of Markdown.

        `base` loads the model that training began from, if there was one.
        """
