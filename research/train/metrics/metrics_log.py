"""The metrics of a step go to metrics.jsonl, TensorBoard and the progress view."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from research.config.run_config import Config
from research.core.errors import DivergedError, SaveError
from research.data.metric_sums import Sums, means_by_group
from research.parallel import runtime
from research.report.progress_view import ProgressView
from research.runs import metrics_file
from research.runs.phase_timer import PhaseTimer
from research.train.metrics import throughput
from research.train.metrics.evaluation import Evaluation, add_metrics
from research.train.step.schedules import make_schedule
from research.train.step.train_step import Metrics


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
    ):
        """`name` is said where several runs speak in one log.

        Raises:
          SaveError: the files of the metrics cannot be written.
        """
        self._number = first
        self._name = f"{name}  " if name else ""
        self._clock = clock
        self._phases = phases
        self._leaves_out = config.optim.skip_spread > 0
        self._flops = flops
        self._groups = groups
        self._schedule: Callable[[int], Any] = make_schedule(config.optim, config.steps)
        self._peak = runtime.peak_flops(config.runtime, config.model.dtype)
        leader = jax.process_index() == 0
        with self._attributed():
            self._file = metrics_file.MetricsFile(folder, first) if leader else None
        mode = config.runtime.progress if leader else "none"
        self._view = ProgressView(console, mode, first, config.steps)

    def __call__(self, number: int, batch: int, sums: Metrics) -> None:
        """Writes the metrics of update `number`, made from the batch numbered `batch`.

        Raises:
          DivergedError: its loss or gradient norm is not finite.
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
            **means,
            "learning_rate": float(self._schedule(number)),
            "grad_norm": values["grad_norm"],
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
            line["grad_norm_by_path"] = norms
        line = add_metrics(line, metrics)
        self._write(number, "train", line)
        self._view.update(number, line, metrics=means_of.keys() - {"loss"})
        # An update that is skipped has changed nothing.
        if not self._leaves_out:
            self._require_finite(number, batch, line, norms)

    def _means(
        self, sums: Sums, means: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gives `loss` and `by_group`, and the other means of the objective.

        A metric of which this step counted nothing is None.
        """
        by_group = means_by_group(sums, self._groups)
        loss = {"loss": float(means["loss"]), "by_group": by_group.pop("by_group")}
        metrics = {
            name: float(value) if np.sum(sums[name].denominator) > 0 else None
            for name, value in means.items()
            if name != "loss"
        }
        return loss, metrics | by_group

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
            f"batch_hash {line['batch_hash']}; {where}); the checkpoints before are as "
            "they were: lower config.optim.learning_rate, look at the batch, or leave "
            "such batches out with --config.optim.rollbacks=3",
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

    @contextlib.contextmanager
    def _attributed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"the metrics of step {self._number} could not be written: {error}; "
                "make room or give back the right to write, then start the same "
                "command again",
                self._number,
            ) from error

    def evaluation(self, number: int, found: Evaluation) -> None:
        """Writes the losses of the held-out rows after update `number`."""
        # The wall time of this process so far, by phase.
        line = found.line() | {"seconds": self._phases.seconds}
        self._write(number, "eval", line)
        shown = {"eval_loss": found.loss, "bits_per_byte": found.bits_per_byte}
        measured = {
            f"eval_{name}": value
            for name, value in found.metrics.items()
            if not isinstance(value, dict)
        }
        self._view.update(number, shown | measured, line=False, metrics=measured)
        bits = found.bits_per_byte
        more = f"  {bits:.4f} bits per byte" if bits is not None else ""
        logging.info(
            "%sstep %d  held-out loss %.4f%s", self._name, number, found.loss, more
        )

    def close(self) -> None:
        """Ends the progress view and closes the files; raises no error of the disk."""
        self._view.close()
        if self._file:
            # `_write` or `sync` has already reported an error.
            with contextlib.suppress(OSError):
                self._file.close()
