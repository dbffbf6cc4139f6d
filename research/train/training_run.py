"""A run that is ready to train: what every part of the train room works on."""

import dataclasses
import logging
from typing import Any

from rich.console import Console

from research.config.run_config import Config
from research.engine.text_generation import SlotDecoders
from research.formats.base_model import Base
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.tasks.task_protocol import Task
from research.train.doctor import Examination
from research.train.metrics import throughput
from research.train.metrics.held_out_answers import HeldOutAnswers, JudgedAnswers
from research.train.step import train_step
from research.weights.trainable import Trainable


@dataclasses.dataclass
class TrainingRun:
    """A run that has passed its doctor: everything the loop needs.

    Attributes:
      config: with the number of steps, also where the user gave epochs.
      alike: the split of `definition`, for programs that only read the model: in a pack
        its `forward` gives the same shapes for all runs, see `pack_arrays.alike`.
      state: what is trained; None while a checkpoint is read, to make room for it.
      answers: the held-out rows that are answered; runs of one seed share them.
      evaluated: step and loss of the last evaluation.
      answered: the last answers to the held-out rows.
      ended_early: the loss that ended the run before its last step, as a clause.
    """

    config: Config
    folder: RunDir
    base: Base
    task: Task
    definition: train_step.StepDefinition
    alike: Trainable
    decoders: SlotDecoders
    state: train_step.TrainState | None
    frozen: dict[str, Any]
    examination: Examination
    console: Console
    phases: PhaseTimer
    history: History
    answers: HeldOutAnswers
    evaluated: tuple[int, float] | None = None
    answered: JudgedAnswers | None = None
    ended_early: str = ""

    @property
    def microbatches(self) -> int:
        """Forward passes per optimizer step."""
        return self.config.data.passes_per_step

    @property
    def shares_programs(self) -> bool:
        """Whether the programs that read its model serve all runs of a pack."""
        return self.alike is not self.definition.trainable

    @property
    def measured_on(self) -> str:
        """The mark of its held-out rows in `metrics.jsonl`."""
        return self.history.measured_on(self.task.sha256, {})[:12]

    def warn(self, text: str) -> None:
        """Logs a warning and keeps it in the run's history."""
        logging.warning("%s", text)
        self.history.event(text)

    def count_flops(self) -> throughput.FlopCount:
        """The FLOPs of one step of this run, for MFU."""
        counted = throughput.count_trained(
            self.state.params, self.definition.trainable, self.definition.model
        )
        return throughput.count_flops(self.base.architecture, **counted)
