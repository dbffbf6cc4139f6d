"""The progress of a run: a live bar in a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from research.core.errors import look_up

REPORTED_EVERY = 10.0  # Seconds between two lines about answers.
SHOWN = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.3f}",
    "eval_loss": "eval {:.3f}",
    "bits_per_byte": "{:.3f} bits/byte",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "norm {:.2f}",
    "skipped": "skipped {}",
    "tokens_per_s": "{:,.0f} tok/s",
    "trained_tokens_per_s": "{:,.0f} trained/s",
    "mfu": "MFU {:.0%}",
    "memory_gb": "{:.1f} GB",
}


def summary(values: dict[str, Any], metrics: Iterable[str] = ()) -> str:
    """`loss 1.234  eval 1.300  ...`: the values that are known, on one line.

    `metrics` are the names of the objective's own means, which stand at the end.
    """
    forms = SHOWN | {name: f"{name} {{:.3f}}" for name in metrics}
    known = {k: v for k, v in values.items() if k in forms and v is not None}
    return "  ".join(form.format(known[k]) for k, form in forms.items() if k in known)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as `1:02:03` or `2:03`."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


class ProgressView:
    """Shows the steps done, the time left and the latest numbers.

    The time left is estimated from the steps of this process, evaluations included.
    """

    def __init__(self, console: Console, mode: str, first: int, total: int):
        self._first, self._total = first, total
        self._begun = time.monotonic()
        self._values: dict[str, Any] = {}
        self._metrics: dict[str, None] = {}  # A set in the order of arrival.
        modes = {"bar": True, "lines": False, "auto": console.is_terminal}
        live = look_up(modes, mode, "config.runtime.progress")
        self._progress: Progress | None = None
        if live:
            self._progress = Progress(
                SpinnerColumn("line"),  # ASCII, for any console.
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}", style="cyan"),
                console=console,
            )
            self._task = self._progress.add_task(
                "train", total=total, completed=first, eta="-"
            )
            # The numbers have a row of their own, because an ordinary terminal is too
            # narrow for both.
            self._live = Live(self, console=console, refresh_per_second=4)
            self._live.start()
            # Log lines must pass through the console, or they would break the bar.
            self._handlers = logging.getLogger().handlers[:]
            logging.getLogger().handlers[:] = [
                RichHandler(
                    console=console,
                    show_time=False,
                    show_level=False,
                    show_path=False,
                    markup=False,
                    highlighter=None,
                )
            ]

    def __rich__(self) -> Group:
        numbers = summary(self._values, self._metrics) or "compiling"
        return Group(self._progress, Text(numbers, style="dim"))

    def update(
        self,
        step: int,
        values: dict[str, Any],
        *,
        line: bool = True,
        metrics: Iterable[str] = (),
    ) -> None:
        """Shows `values` beside the earlier ones; `metrics` names those that only this
        task has. Where there is no bar, they get a log line if `line` is true.
        """
        # A name with a slash is one of many, such as the load of one expert.
        self._metrics |= dict.fromkeys(x for x in sorted(metrics) if "/" not in x)
        self._values.update(values)
        eta = self._eta(step)
        if self._progress:
            self._progress.update(self._task, completed=step, eta=eta)
        elif line:
            logging.info(
                "step %*d/%d  ETA %s  %s",
                len(str(self._total)),
                step,
                self._total,
                eta,
                summary(self._values, self._metrics),
            )

    def _eta(self, step: int) -> str:
        done = step - self._first
        if done < 1:
            return "-"
        per_step = (time.monotonic() - self._begun) / done
        return duration(per_step * (self._total - step))

    def close(self) -> None:
        if self._progress:
            self._live.stop()
            logging.getLogger().handlers[:] = self._handlers


class AnswerCount:
    """Logs how far the answers are, and when they will be done."""

    def __init__(self, what: str, done: int, total: int):
        """`done` of `total` were there already; `what` is counted, such as "rows"."""
        self._what, self._first, self._done = what, done, done
        self._total, self._tokens = total, 0
        self._begun = self._told = time.monotonic()

    def add(self, tokens: int, share: float | None = None) -> None:
        """One more is done, with so many new tokens.

        `share` is that of the work of this start; 0: nobody can tell yet, and None: all
        take alike.
        """
        self._done += 1
        self._tokens += tokens
        now = time.monotonic()
        if now - self._told < REPORTED_EVERY and self._done < self._total:
            return
        self._told, seconds = now, now - self._begun
        if share is None:
            share = (self._done - self._first) / (self._total - self._first)
        eta = duration(seconds / share - seconds) if share else "estimating"
        logging.info(
            "%d of %d %s  %.1f tok/s  ETA %s",
            self._done,
            self._total,
            self._what,
            self._tokens / seconds,
            eta,
        )
