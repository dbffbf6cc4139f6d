"""The report of a run that is done, in all its forms."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from research.core.atomic_files import write_whole
from research.report import loss_plot, run_page, terminal
from research.report.run_results import RunResults

T = TypeVar("T")


def write_report(console: Console, folder: Path, results: RunResults) -> list[str]:
    """Shows `results` in the terminal, and writes the plot and both reports.

    A defect in one part costs no other.

    Returns:
      One line for each part that failed.

    Raises:
      OSError: the folder cannot be written; another call may succeed.
    """
    failed: list[str] = []
    attempt(
        "the terminal", lambda: terminal.show_results(console, results), failed, OSError
    )
    makers: dict[str, Callable[[], str | bytes]] = {
        "loss.png": lambda: loss_plot.draw_loss(results),
        "report.md": lambda: run_page.format_report(results),
        "report.html": lambda: run_page.format_page(results, made["loss.png"]),
    }
    made: dict[str, Any] = {}
    for name, make in makers.items():
        made[name] = attempt(name, make, failed, OSError) or b""
        if made[name]:
            write_whole(folder / name, made[name])
    return failed


def attempt(
    part: str,
    make: Callable[[], T],
    failed: list[str],
    *passing: type[Exception],
) -> T | None:
    """Returns `make()`, or None where it fails.

    A report must never cost a run that has trained to its last step. So a defect is
    logged with its traceback and named in `failed`; only errors of a `passing` class
    are raised.
    """
    try:
        return make()
    except passing:
        raise
    except Exception as error:
        logging.exception("the report has no part for %s", part)
        failed.append(f"{part}: {type(error).__name__}: {error}")
        return None
