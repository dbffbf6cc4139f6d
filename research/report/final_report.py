"""The report of a run that is done, in all its forms."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from research.core.atomic_files import write_whole
from research.report import loss_plot, markdown_report, terminal
from research.report.run_results import RunResults

T = TypeVar("T")


def write_report(console: Console, folder: Path, results: RunResults) -> list[str]:
    """Shows `results` in the terminal, and writes `loss.png` and `report.md`.

    A defect in one part costs no other.

    Returns:
      One line for each part that failed.

    Raises:
      OSError: the folder cannot be written; another call may succeed.
    """
    markdown = folder / "report.md"
    parts: dict[str, Callable[[], None]] = {
        "the terminal": lambda: terminal.show_results(console, results),
        "loss.png": lambda: loss_plot.draw_loss(results, folder / "loss.png"),
        "report.md": lambda: write_whole(
            markdown, markdown_report.format_report(results)
        ),
    }
    failed: list[str] = []
    for name, make in parts.items():
        attempt(name, make, failed, OSError)
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
