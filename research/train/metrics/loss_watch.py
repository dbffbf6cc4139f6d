"""The losses of a run decide on an early end, and on saves between the regular ones.

The loss of a step may be read while the next step runs. So after step N a run is judged
by the training losses up to step N - 1, whatever else is done there: a run that resumes
at step N ends and saves at the same steps as one that was never interrupted.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from research.config.knob_groups import CheckpointConfig, EvalConfig, OptimConfig
from research.parallel import agreement
from research.runs import metrics_file

WINDOW = 10  # steps whose mean is the training loss that decides


@dataclasses.dataclass
class LossWatch:
    """The losses of one run, as far as a decision can depend on them.

    Attributes:
      recent: the losses of the last `WINDOW` steps, the newest last.
      means: their mean after each of the last two steps, `[step, mean]`.
      level: the mean that the next drop is measured from; None before a full window.
      dropped: the last two steps after which the mean had dropped far enough.
      evaluated: the held-out loss of the newest evaluation after the first step.
    """

    recent: list[float] = dataclasses.field(default_factory=list)
    means: list[list[float]] = dataclasses.field(default_factory=list)
    level: float | None = None
    dropped: list[int] = dataclasses.field(default_factory=list)
    evaluated: float | None = None

    def add(self, step: int, loss: float, drop: float) -> None:
        """Takes the training loss of `step`; `drop` is `checkpoint.loss_drop`."""
        self.recent = [*self.recent, loss][-WINDOW:]
        if len(self.recent) < WINDOW:
            return
        mean = sum(self.recent) / WINDOW
        self.means = [*self.means, [step, mean]][-2:]
        if self.level is None:
            self.level = mean
        elif drop and mean <= (1 - drop) * self.level:
            self.level, self.dropped = mean, [*self.dropped, step][-2:]

    def has_dropped(self, step: int) -> bool:
        """Whether the training loss says that `step` is to be saved."""
        return step - 1 in self.dropped

    def why_end(self, step: int, optim: OptimConfig, evals: EvalConfig) -> str:
        """Why the run ends with `step` updates, as a clause; empty if it does not."""
        mean = next((mean for at, mean in self.means if at == step - 1), None)
        if mean is not None and mean <= optim.stop_loss > 0:
            return (
                f"the training loss was {mean:.4f} as the mean of {WINDOW} steps, and "
                f"config.optim.stop_loss is {optim.stop_loss:g}"
            )
        if self.evaluated is not None and self.evaluated <= evals.stop_loss > 0:
            return (
                f"the held-out loss was {self.evaluated:.4f}, and "
                f"config.eval.stop_loss is {evals.stop_loss:g}"
            )
        return ""


def resumed_watch(
    folder: Path,
    first: int,
    measured_on: str,
    optim: OptimConfig,
    evals: EvalConfig,
    checkpoint: CheckpointConfig,
) -> LossWatch:
    """The watch of a run after `first` updates, from its `metrics.jsonl`.

    The first process reads. Nothing is read where no knob asks for it.

    Args:
      measured_on: the mark of the held-out rows; other evaluations do not count.
    """
    watch, drop = LossWatch(), checkpoint.loss_drop
    if not first or not (optim.stop_loss or evals.stop_loss or drop):
        return watch
    if jax.process_index() == 0:
        _replay(watch, metrics_file.read_metrics(folder), first, measured_on, drop)
    return LossWatch(**agreement.of_first(dataclasses.asdict(watch)))


def _replay(
    watch: LossWatch,
    lines: Iterable[Mapping[str, Any]],
    first: int,
    measured_on: str,
    drop: float,
) -> None:
    for line in lines:
        if not 0 < line["step"] <= first:
            continue
        if line["kind"] == "train":
            watch.add(line["step"], line["loss"], drop)
        elif line["kind"] == "eval" and line.get("data") == measured_on:
            watch.evaluated = line["loss"]
