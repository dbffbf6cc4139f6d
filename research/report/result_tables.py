"""The tables of a report as rows of words, for the terminal and for Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Table = list[list[str]]  # A header, and a row below it for each group or phase.
LARGEST_EXPONENT = 700  # `math.exp` overflows a little above it.


def is_text(evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether whole texts were evaluated, so that there are bits per byte, too."""
    return bool(evaluations) and evaluations[-1].get("bits_per_byte") is not None


def tabulate_losses(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """Losses and perplexities by group, first and last; empty without evaluations.

    Args:
      evaluations: lines of kind `eval` in `metrics.jsonl`, in the order of steps.
    """
    if not evaluations:
        return []
    after = evaluations[-1]
    before = _first_comparable(evaluations)
    text = is_text(evaluations)
    first, last = ("start", "end") if text else ("base", "tuned")
    header = ["source" if text else "category", "tokens", f"loss {first}", last]
    header += [f"ppl {first}", last, "change"]
    if text:
        header += [f"bits/byte {first}", last]
    rows = []
    for group, loss in sorted(after["by_group"].items()):
        losses = before["by_group"].get(group, math.nan), loss
        bits = [x["bits_by_group"].get(group) for x in (before, after)] if text else []
        tokens = after["tokens"].get(group, 0)
        rows.append(_row(group or "(none)", tokens, *losses, bits))
    bits = [x.get("bits_per_byte") for x in (before, after)] if text else []
    total = sum(after["tokens"].values())
    rows.append(_row("all", total, before["loss"], after["loss"], bits))
    return [header, *rows]


def _first_comparable(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The earliest evaluation of the held-out tokens that the last one measured.

    A run that was resumed with other data has evaluations of both data sets, and
    their losses say nothing about each other.
    """
    first = evaluations[-1]
    for line in reversed(evaluations):
        if line["tokens"] != first["tokens"]:
            break
        first = line
    return first


def _row(
    name: str, tokens: int, before: float, after: float, bits: Sequence[float | None]
) -> list[str]:
    perplexities = [math.exp(min(x, LARGEST_EXPONENT)) for x in (before, after)]
    return [
        name,
        f"{tokens:,}",
        f"{before:.3f}",
        f"{after:.3f}",
        *(f"{perplexity:.2f}" for perplexity in perplexities),
        f"{after - before:+.3f}",
        *("-" if value is None else f"{value:.3f}" for value in bits),
    ]


def tabulate_wall_time(seconds: Sequence[tuple[str, float]]) -> Table:
    """Seconds and share of each phase; empty without phases."""
    if not seconds:
        return []
    total = sum(s for _, s in seconds) or 1.0
    rows = [[name, f"{s:,.1f}", f"{s / total:.1%}"] for name, s in seconds]
    return [["phase", "seconds", "share"], *rows]
