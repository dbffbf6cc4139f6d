"""The metrics of a step go to metrics.jsonl, TensorBoard and the progress view."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from research.config.run_config import Config, hyperparameters
from research.core.errors import DivergedError, files_of_step
from research.data.grouped_values import group_fields
from research.data.metric_sums import Sums, means_by_group
from research.evaluate.held_out_losses import Evaluation, add_metrics
from research.parallel import runtime
from research.report.progress_view import ProgressView
from research.runs import metrics_file
from research.runs.phase_timer import PhaseTimer
from research.tasks import epochs
from research.train.metrics import throughput
from research.train.step.schedules import make_schedule
from research.train.step.train_step import Metrics

EARLIER = "nothing of it is saved, and the checkpoints before are as they were"


class SkippedInARow:
    """Ends a run in which one update after the other is skipped.

    Numbers that are not finite do not heal by themselves, and FEW of them end the run.
    A new level of finite ones is accepted in time: with a spread of 2 or more within a
    fifth of the window.
    """

    FEW = 8

    def __init__(self, config: Config, first: int):
        """`first`: the step at which this start begins."""
        self._steps = config.steps
        self._many = max(self.FEW, config.optim.skip_window // 4)
        # How many updates were skipped before this one; unknown after a resume.
        self._before = None if first else 0
        self._in_a_row = 0

    def count(self, number: int, line: Mapping[str, Any]) -> None:
        """Takes the metrics of update `number`.

        Raises:
          DivergedError: too many updates in a row were skipped.
        """
        before, self._before = self._before, line["skipped"]
        is_skipped = before is not None and line["skipped"] > before
        self._in_a_row = self._in_a_row + 1 if is_skipped else 0
        is_finite = math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
        if self._in_a_row >= min(self._many if is_finite else self.FEW, self._steps):
            raise DivergedError(
                f"the last {self._in_a_row} updates up to step {number} were skipped; "
                f"the last had loss {line['loss']} and gradient norm "
                f"{line['grad_norm']}, and the parameters no longer change: lower "
                "config.optim.learning_rate, look at the rows, or raise "
                "config.optim.skip_spread",
                number,
                None,
            )


class StepLog:
    """Turns a step's sums into lines, TensorBoard points and the progress view."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        console: Console,
        clock: throughput.Clock,
        flops: throughput.FlopCount,
        groups: Sequence[str],
        first: int,
        phases: PhaseTimer,
        name: str = "",
        rows: int = 0,
    ):
        """`name` is said where several runs speak in one log; `rows` are those of an
        epoch, 0 if nobody has counted them.

        Raises:
          SaveError: the files of the metrics cannot be written.
        """
        self._number = first
        self._name = f"{name}  " if name else ""
        self._clock = clock
        self._phases = phases
        self._skips = SkippedInARow(config, first) if config.optim.skip_spread else None
        self._flops = flops
        self._groups = groups
        self._epoch = functools.partial(epochs.passed, config=config, rows=rows)
        self._schedule: Callable[[int], Any] = make_schedule(config.optim, config.steps)
        self._peak = runtime.peak_flops(config.runtime)
        leader = jax.process_index() == 0
        with self._attributed():
            self._file = (
                metrics_file.MetricsFile(folder, first, hyperparameters(config))
                if leader
                else None
            )
        mode = config.runtime.progress if leader else "lines"
        self._view = ProgressView(console, mode, first, config.steps)

    def __call__(self, number: int, batch: int, sums: Metrics) -> float:
        """Writes the metrics of update `number`, made from the batch numbered `batch`.

        Returns:
          Its loss.

        Raises:
          DivergedError: its loss, gradient norm or parameters are not finite, or one
            update after the other is skipped.
          SaveError: it could not be written down.
        """
        found = dict(sums)
        by_path = found.pop("grad_norm_by_path", {})
        norms = {path: float(norm) for path, norm in by_path.items()}
        means_of = found.pop("means")
        means, metrics = self._means(found.pop("sums"), means_of)
        found = {name: np.asarray(value) for name, value in found.items()}
        values = {name: float(value) for name, value in found.items()}
        self._clock.tick()
        seconds = self._clock.last
        flops = self._flops.step(values["tokens"], values["weight"], values["pairs"])
        line = {
            "epoch": self._epoch(batch + 1),
            **means,
            "learning_rate": float(self._schedule(number)),
            "grad_norm": values["grad_norm"],
            "param_norm": values["param_norm"],
            "tokens": int(values["tokens"]),
            "batch_hash": int(found["batch_hash"]),
            "trained_tokens": int(values["weight"]),
            "step_s": seconds,
            "elapsed_s": self._clock.elapsed,
            "tokens_per_s": values["tokens"] / seconds,
            "trained_tokens_per_s": values["weight"] / seconds,
            "mfu": flops / seconds / self._peak if self._peak else None,
            "memory_gb": runtime.peak_memory_bytes() / 1e9,
            "goodput": self._goodput(),
        }
        if "skipped" in values:
            line["skipped"] = int(values["skipped"])
        if norms:
            line |= group_fields("grad_norm", norms)
        line = add_metrics(line, metrics)
        self._write(number, "train", line)
        self._view.update(number, line, metrics=means_of.keys() - {"loss"})
        if self._skips:
            self._skips.count(number, line)
        else:
            self._require_finite(number, batch, line, norms)
        if not math.isfinite(line["param_norm"]):
            raise DivergedError(
                f"the parameters after step {number} are not finite or too large "
                f"(norm {line['param_norm']}; batch {batch}, batch_hash "
                f"{line['batch_hash']}); {EARLIER}: lower config.optim.learning_rate, "
                f"or raise config.optim.eps if it is very small",
                number,
                batch,
            )
        return line["loss"]

    def _means(
        self, sums: Sums, means: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gives the loss, and the other means of the objective, with those by group.

        A metric of which this step counted nothing is None.
        """
        others = {name: ratio for name, ratio in sums.items() if name != "loss"}
        loss = means_by_group({"loss": sums["loss"]}, self._groups)
        metrics = {
            name: float(means[name]) if np.sum(ratio.denominator) > 0 else None
            for name, ratio in others.items()
        }
        return (
            {"loss": float(means["loss"])} | loss,
            metrics | means_by_group(others, self._groups),
        )

    def _goodput(self) -> float:
        """Share of this process's life so far that were steps."""
        seconds = self._phases.seconds
        return seconds["step"] / sum(seconds.values())

    def _require_finite(
        self, number: int, batch: int, line: dict[str, Any], norms: dict[str, float]
    ) -> None:
        loss, norm = line["loss"], line["grad_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            return
        if norms:
            odd = [path for path, value in norms.items() if not math.isfinite(value)]
            where = f"gradients not finite: {', '.join(odd) or 'no single one'}"
        else:
            where = "--config.runtime.grad_norms=True names the parameters"
        raise DivergedError(
            f"step {number} gave loss {loss} and gradient norm {norm} (batch {batch}, "
            f"batch_hash {line['batch_hash']}; {where}); {EARLIER}: lower "
            "config.optim.learning_rate, look at the batch, or drop such batches with "
            "--config.optim.rollbacks=3",
            number,
            batch,
        )

    def _write(self, number: int, kind: str, line: dict[str, Any]) -> None:
        if not self._file:
            return
        self._number = number
        with self._attributed():
            self._file.write(number, kind, line)

    def sync(self) -> None:
        """Waits until all lines would survive a power loss."""
        if self._file:
            with self._attributed():
                self._file.sync()

    def _attributed(self) -> contextlib.AbstractContextManager[None]:
        return files_of_step(self._number, f"the metrics of step {self._number}")

    def evaluation(
        self, number: int, found: Evaluation, batch: int | None, data: str
    ) -> None:
        """Writes the losses of the held-out rows after update `number`.

        Args:
          number: of the update.
          found: the losses.
          batch: the number of the batch of that update, None before the first.
          data: a mark of the held-out rows, see `TrainingRun.measured_on`.

        Raises:
          DivergedError: the loss is not finite.
          SaveError: it could not be written down.
        """
        # The wall time of this process so far, by phase.
        line = {
            "epoch": self._epoch(0 if batch is None else batch + 1),
            "data": data,
            **found.line(),
            **group_fields("seconds", self._phases.seconds),
        }
        self._write(number, "eval", line)
        shown = {"eval_loss": found.loss, "bits_per_byte": found.bits_per_byte}
        measured = {f"eval_{name}": value for name, value in found.means.items()}
        self._view.update(number, shown | measured, line=False, metrics=measured)
        bits = found.bits_per_byte
        more = f"  {bits:.4f} bits per byte" if bits is not None else ""
        logging.info(
            "%sstep %d  held-out loss %.4f%s", self._name, number, found.loss, more
        )
        if not math.isfinite(found.loss):
            cause = "lower config.optim.learning_rate"
            if batch is None:
                cause = "look at the base model's weights and at the held-out rows"
            raise DivergedError(
                f"the held-out loss after step {number} is {found.loss}; {EARLIER}: "
                f"{cause}",
                number,
                batch,
            )

    def answers(
        self, number: int, rows: int, values: Mapping[str, float | None]
    ) -> None:
        """Writes what the answers to `rows` held-out rows are worth after an update.

        Raises:
          SaveError: it could not be written down.
        """
        self._write(number, "answers", {"rows": rows, **values})
        shown = [f"{k} {v:.3f}" for k, v in values.items() if v is not None]
        logging.info("%sstep %d  answers: %s", self._name, number, ", ".join(shown))

    def close(self) -> None:
        """Ends the progress view and closes the files; raises no error of the disk."""
        self._view.close()
        if self._file:
            # `_write` or `sync` has already reported an error.
            with contextlib.suppress(OSError):
                self._file.close()
