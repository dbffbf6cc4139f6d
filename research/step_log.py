"""What is written down of a step: metrics.jsonl, TensorBoard, the progress view."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from research import metrics, runtime
from research.config import Config
from research.evaluate import Evaluation
from research.optim import make_schedule
from research.progress import ProgressView
from research.step import Metrics


class StepLog:
    """Turns a step's sums into lines, TensorBoard points and the progress view."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        console: Console,
        clock: metrics.Clock,
        flops: metrics.FlopCount,
        groups: Sequence[str],
        first: int,
    ):
        self._clock = clock
        self._flops = flops
        self._groups = groups
        self._schedule: Callable[[int], Any] = make_schedule(config.optim, config.steps)
        self._peak = runtime.peak_flops(config.runtime, config.model.dtype)
        leader = jax.process_index() == 0
        self._file = metrics.MetricsFile(folder, first) if leader else None
        mode = config.runtime.progress if leader else "none"
        self._view = ProgressView(console, mode, first, config.steps)

    def __call__(self, number: int, sums: Metrics) -> None:
        """Of update `number`."""
        found = {name: np.asarray(value) for name, value in sums.items()}
        losses, weights = found.pop("group_loss"), found.pop("group_weight")
        values = {name: float(value) for name, value in found.items()}
        self._clock.tick()
        seconds = self._clock.last
        flops = self._flops.step(values["tokens"], values["weight"], values["pairs"])
        line = {
            "loss": values["loss"],
            "by_group": {
                name: float(losses[i] / weights[i])
                for i, name in enumerate(self._groups)
                if weights[i] > 0
            },
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
        }
        if "skipped" in values:
            line["skipped"] = int(values["skipped"])
        if self._file:
            self._file.write(number, "train", line)
        self._view.update(number, line)

    def evaluation(self, number: int, found: Evaluation) -> None:
        """Of the held-out rows after update `number`."""
        line = dataclasses.asdict(found)
        if self._file:
            self._file.write(number, "eval", line)
        shown = {"eval_loss": found.loss, "bits_per_byte": found.bits_per_byte}
        self._view.update(number, shown, line=False)
        bits = found.bits_per_byte
        more = f"  {bits:.4f} bits per byte" if bits is not None else ""
        logging.info("step %d  held-out loss %.4f%s", number, found.loss, more)

    def close(self) -> None:
        self._view.close()
        if self._file:
            self._file.close()
