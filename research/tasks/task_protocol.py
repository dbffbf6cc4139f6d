"""The methods that a training run calls on its task: all that tasks differ in.

A task returns data and prints nothing. `research.report` shows what it returns.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from research.config.run_config import Config
from research.data.batch_order import Batches
from research.data.instructions.instruction_dataset import PackedDocuments
from research.data.metric_sums import Objective
from research.data.token_batch import Batch
from research.engine.text_generation import TextGenerator
from research.formats.base_model import Base
from research.tasks.findings import Finding
from research.tasks.model_answers import HeldOutPrompt, Sample
from research.tasks.row_preview import PreviewRow, RowPage
from research.tokenize.conversation import Record, Turn
from research.tokenize.tokenizer import Tokenizer


class PromptFormat(Protocol):
    """Turns a prompt, or a text to continue, into ids; `stop_ids` end an answer."""

    stop_ids: frozenset[int]

    def encode_prompt(self, turns: Sequence[Turn], context: str = "") -> list[int]: ...

    def encode_text(self, text: str, with_start: bool = True) -> list[int]: ...


class Task(Protocol):
    """One kind of training: its rows, and what it reports of them and of the model.

    Attributes:
      groups: names of the categories or sources that `Batch.groups` numbers.
      origin: the files or datasets of the rows, for people.
      sha256: of the rows, to tell one dataset from another.
      rows: different training rows, packed, which one epoch trains; 0 if they are
        not counted.
      left_out: `where: reason` for each row that is dropped or cut; of documents of raw
        text for the first ones, and `and 7 more: reason` for the others.
      held_out_bytes: UTF-8 bytes of the held-out text by group, where it is text.
    """

    groups: Sequence[str]
    origin: str
    sha256: str
    rows: int
    left_out: Sequence[str]
    held_out_bytes: Mapping[str, int]

    def batches(self, mine: Sequence[int]) -> Batches:
        """Training batches; `mine` are the rows of each that this process builds."""

    def held_out(self, rows: int, mine: Sequence[int]) -> list[Batch]:
        """Every held-out row once, in batches of `rows`."""

    def examine(self) -> list[Finding]:
        """Findings about the rows, for the doctor; one that is not ok stops the run."""

    def preview(self, count: int) -> list[PreviewRow]:
        """The first `count` training rows, or fewer where there are fewer.

        Where rows were read from several schemas, some documents of each follow.
        """

    def sample(self, step: int, model: TextGenerator) -> list[Sample]:
        """Text that the model writes after `step` updates; empty for most tasks.

        All processes call it, since all must compute.
        """

    def asked(self) -> list[HeldOutPrompt]:
        """The held-out rows that models are asked; empty where there are none."""

    def not_asked(self) -> list[str]:
        """`file:line: reason` for each held-out row that no model can be asked."""


@dataclasses.dataclass(frozen=True)
class WholeTexts:
    """Documents that are evaluated whole, as they have no answers.

    Attributes:
      sources: the name of each document's source.
      sizes: UTF-8 bytes of each; 0 where its ids do not stand for all of it.
      batches: `batches(rows)` gives every document once, in their order, in batches of
        `rows`; with each the numbers of the documents `[rows, seq]`, -1 for padding.
        All documents begin with the same id.
    """

    sources: Sequence[str]
    sizes: Sequence[int]
    batches: Callable[[int], Iterable[tuple[Batch, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class EvaluationRows:
    """Rows that a trained model is evaluated on; none of them is for training.

    Attributes:
      groups, origin, sha256, left_out: as those of a `Task`.
      unused: a line for people on each column that is filled and not used.
      texts: the rows, where each is a whole text; otherwise there are the next two.
      packed: the same rows as documents, where each is a prompt with its answer.
      records: reads these rows as text; some may have no document, since they are too
        long or have no answer.
    """

    groups: Sequence[str]
    origin: str
    sha256: str
    left_out: Sequence[str]
    unused: Sequence[str] = ()
    texts: WholeTexts | None = None
    packed: PackedDocuments | None = None
    records: Callable[[], Iterable[Record]] = tuple


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """One kind of task, before its data is read; `config.choices` lists them.

    Attributes:
      load: reads the data. Raises UserError where that fails or nothing is left.
      objective: `objective(config, mesh, groups)`, for so many groups of `Task.groups`.
      expected_groups: how many groups the task will have, as far as its config says:
        the planner reads no data.
      prompt_format: how prompts are put to a model of this task.
      longest_prompt: the most tokens of a prompt that the model is given in the run.
      exported_tokenizer: `exported_tokenizer(config, base, system)`, the tokenizer to
        export beside the trained model, which was trained with this system text.
      check: raises UserError for what is wrong in the config alone.
      rows_of_files: `rows_of_files(config, base, files)` reads the files as held-out
        rows by the rules of `config`; None where a task has no such rows.
      held_out_rows: `held_out_rows(config, base)` gives the held-out rows of a run, or
        None where it holds out none.
      training_records: `training_records(config, base)` reads the rows that a run
        trains, one by one; None where they are no prompts with answers.
      browse: `browse(config, base, first, count)` gives some training rows and facts of
        all, for pages; None where the first rows of a batch are all that is known.
    """

    load: Callable[[Config, Base], Task]
    objective: Callable[[Config, Mesh, int], Objective]
    expected_groups: Callable[[Config], int]
    prompt_format: Callable[[Config, Base], PromptFormat]
    longest_prompt: Callable[[Config], int] = lambda config: config.data.seq_len
    exported_tokenizer: Callable[[Config, Base, str], Tokenizer] = (
        lambda config, base, system: base.tokenizer
    )
    check: Callable[[Config], None] = lambda config: None
    rows_of_files: Callable[[Config, Base, str], EvaluationRows] | None = None
    held_out_rows: Callable[[Config, Base], EvaluationRows | None] = (
        lambda config, base: None
    )
    training_records: Callable[[Config, Base], Iterable[Record]] | None = None
    browse: Callable[[Config, Base, int, int], RowPage | None] = (
        lambda config, base, first, count: None
    )
