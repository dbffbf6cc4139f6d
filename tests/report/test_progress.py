"""The live bar shows everything on an ordinary terminal; log lines leave it whole."""

import io
import logging
import re

import pytest
from rich.console import Console

from research.report import terminal
from research.report.progress_view import ProgressView
from research.tasks.findings import Finding
from research.tasks.model_answers import ComparedAnswer

VALUES = {
    "loss": 2.5,
    "eval_loss": 2.9,
    "learning_rate": 5e-4,
    "grad_norm": 0.5,
    "tokens_per_s": 333.0,
    "trained_tokens_per_s": 120.0,
    "mfu": 0.44,
    "memory_gb": 2.5,
}


@pytest.mark.parametrize("width", [1, 20])
def test_a_narrow_terminal_without_letters_shows_what_fits(width):
    out = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace")
    console = Console(file=out, force_terminal=True, width=width)
    view = ProgressView(console, "bar", 0, 60)
    view.update(3, VALUES)
    logging.getLogger().warning("a line beside the bar")
    view.close()
    terminal.show_findings(console, [Finding("data", "many words " * 9)])
    answer = ComparedAnswer("[/x]", "r:1", "Why?", "base", "tuned", "so")
    terminal._show_answer(console, answer)
    out.flush()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.buffer.getvalue().decode())
    shown = re.sub(r"\\u[0-9a-f]{4}", "?", shown)
    lines = [line.rstrip() for line in re.split(r"[\r\n]", shown)]
    assert max(map(len, lines)) <= width
    assert width == 1 or "loss 2.500" in shown


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_and_says_everything(width):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=width)
    before = logging.getLogger().handlers[:]
    view = ProgressView(console, "bar", 0, 60)
    view.update(3, VALUES)
    logging.getLogger().warning("a line beside the bar")
    view.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]", shown)]
    assert max(map(len, lines)) <= width
    for part in ("3/60", "ETA", "2.500", "2.900", "5.0e-04", "333 tok/s", "44%"):
        assert part in shown, part
    assert "120 trained/s" in shown and "2.5 GB" in shown
    assert "a line beside the bar" in lines
    assert logging.getLogger().handlers == before
