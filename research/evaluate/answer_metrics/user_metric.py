"""A user's own metric: `module:function(row, answer) -> number`."""

import hashlib
import importlib
import inspect
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError, nearest
from research.evaluate.answer_metrics.answer_metric import AnswerMetric
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.statistics import measured
from research.evaluate.statistics.measured import Measured

# After so many seconds people want to know what the command waits for.
SLOW_SECONDS = 10.0
SIGNATURE = "function(row, answer) that returns a number, or None for a row to skip"


def user_metric(name: str) -> AnswerMetric:
    """The metric of a function, named as `module:function`.

    Attributes of the function say more: `higher_is_better` (True, False or None; True
    without it), `needs_reference` (False without it) and `unit` (a word).

    Raises:
      UserError: there is no such module or function, or it cannot be called with a row
        and an answer.
    """
    function = _import(name)
    higher = getattr(function, "higher_is_better", True)
    if higher not in (True, False, None):
        raise UserError(
            f"the metric {name} has higher_is_better = {_short(higher)}; it must be "
            "True, False or None"
        )
    words = " ".join((inspect.getdoc(function) or "a function of the user").split())
    return AnswerMetric(
        name,
        str(getattr(function, "unit", "")),
        higher,
        bool(getattr(function, "needs_reference", False)),
        words,
        lambda rows: _measure(name, function, rows),
    )


def content_of(name: str) -> str:
    """The sha256 of the file that a metric of the user is in; "" if it has none.

    Raises:
      UserError: see `user_metric`.
    """
    _import(name)
    path = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _import(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    # A user's file can fail in any way, and may even exit.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"the metric {name} cannot be imported: {_described(error)}; it must be "
            "MODULE:FUNCTION, and MODULE a file MODULE.py in this folder or on "
            "PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(
            f"the metric {name} names no function of {module_name}"
            f"{nearest(attribute, vars(module))}; it must be a {SIGNATURE}"
        )
    try:
        inspect.signature(function).bind("row", "answer")
    except TypeError as error:
        raise UserError(
            f"the metric {name} cannot be called with a row and an answer: {error}; it "
            f"must be a {SIGNATURE}"
        ) from error
    except ValueError:  # Written in C: it does not say what it takes.
        pass
    return function


def _measure(
    name: str, function: Callable[..., Any], rows: Sequence[AnsweredRow]
) -> Measured:
    scores: list[float | None] = []

    def tell() -> None:
        place = rows[min(len(scores), len(rows) - 1)].place
        logging.warning(
            "the metric %s is slow: after %g seconds it is at row %d of %d, %s",
            *(name, SLOW_SECONDS, len(scores) + 1, len(rows), place),
        )

    timer = threading.Timer(SLOW_SECONDS, tell)
    timer.daemon = True
    start = time.monotonic()
    timer.start()
    try:
        for row in rows:
            scores.append(_number(name, function, row))
    finally:
        timer.cancel()
    seconds = time.monotonic() - start
    if seconds >= SLOW_SECONDS:
        logging.warning("the metric %s took %.0f seconds in all", name, seconds)
    return measured.mean(scores)


def _number(name: str, function: Callable[..., Any], row: AnsweredRow) -> float | None:
    try:
        result = function(row, row.answer)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{row.place}: the metric {name} failed on this row (id {row.id}): "
            f"{_described(error)}"
        ) from error
    if result is None:
        return None
    try:
        number = math.nan if isinstance(result, str | bytes) else float(result)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{row.place}: the metric {name} returned {_short(result)} for this row "
            f"(id {row.id}); it must return a finite number, or None for a row to skip"
        )
    return number


def _described(error: BaseException) -> str:
    """The error, and the line of the user's file that raised it."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    told = isinstance(error, ModuleNotFoundError) or not where
    said = " ".join(f"{type(error).__name__}: {error}".split())  # One line.
    return said + ("" if told else f" ({where})")


def _short(result: object) -> str:
    text = repr(result)
    return text if len(text) <= 60 else f"{text[:57]}..."
