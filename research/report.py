"""What a run leaves for people: the loss plot, the table, the answers."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from research.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Answer:
    """One held-out prompt and what each model makes of it."""

    category: str
    prompt: str
    base: str
    adapted: str
    reference: str


def plot(folder: Path, title: str) -> Path:
    """Draws `loss.png` from `metrics.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    lines = read_metrics(folder)
    train = [line for line in lines if line["kind"] == "train"]
    held = [line for line in lines if line["kind"] == "eval"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharex=True)
    steps = [line["step"] for line in train]
    losses = [line["loss"] for line in train]
    left.plot(steps, losses, color="0.75", linewidth=1, label="train, each step")
    left.plot(steps, _smoothed(losses), color="C0", label="train, smoothed")
    eval_steps = [line["step"] for line in held]
    left.plot(
        eval_steps, [line["loss"] for line in held], "o-", color="C3", label="held out"
    )
    left.set(xlabel="step", ylabel="loss, nats per trained token", title=title)
    left.legend()
    for category in sorted({c for line in held for c in line["by_category"]}):
        values = [line["by_category"].get(category, math.nan) for line in held]
        right.plot(eval_steps, values, "o-", markersize=3, label=category or "(none)")
    right.set(xlabel="step", title="held-out loss per category")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _smoothed(values: list[float], decay: float = 0.85) -> list[float]:
    """Exponential average, corrected for its start."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def table_rows(folder: Path) -> list[list[str]]:
    """Category, tokens, loss and perplexity before and after, change."""
    held = [line for line in read_metrics(folder) if line["kind"] == "eval"]
    before, after = held[0], held[-1]
    rows = [
        _row(c or "(none)", before["tokens"][c], before["by_category"][c], loss)
        for c, loss in sorted(after["by_category"].items())
    ]
    total = sum(before["tokens"].values())
    return [*rows, _row("all", total, before["loss"], after["loss"])]


def _row(name: str, tokens: int, before: float, after: float) -> list[str]:
    return [
        name,
        f"{tokens:,}",
        f"{before:.3f}",
        f"{after:.3f}",
        f"{math.exp(min(before, 700)):.2f}",
        f"{math.exp(min(after, 700)):.2f}",
        f"{after - before:+.3f}",
    ]


HEADER = ["category", "tokens", "loss base", "tuned", "ppl base", "tuned", "change"]


def show_table(console: Console, folder: Path) -> None:
    table = Table(title="held-out responses, base against tuned", title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in table_rows(folder):
        table.add_row(*row, style="bold" if row[0] == "all" else "")
    console.print(table)


def show_answers(console: Console, answers: list[Answer]) -> None:
    for answer in answers:
        console.print(Panel(Text(answer.prompt), title=answer.category, style="dim"))
        side_by_side = Table(show_lines=True, expand=True)
        for name in ("base", "tuned", "reference"):
            side_by_side.add_column(name, ratio=1)
        side_by_side.add_row(
            *map(Text, (answer.base, answer.adapted, answer.reference))
        )
        console.print(side_by_side)


def write_markdown(folder: Path, answers: list[Answer], facts: dict[str, Any]) -> Path:
    """`report.md`: the same for reading later."""
    lines = [f"# {folder.name}", "", "![loss](loss.png)", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", f"| {' | '.join(HEADER)} |", "|---" + "|---:" * 6 + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(folder)]
    for answer in answers:
        lines += ["", f"## A held-out prompt: {answer.category}", ""]
        for name in ("prompt", "base", "adapted", "reference"):
            quoted = getattr(answer, name).replace("\n", "\n> ")
            lines += [f"**{name}**", "", f"> {quoted}", ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
