"""`loss.png`: training and held-out loss over the steps, in all and by group."""

import collections
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.atomic_files import write_whole
from research.core.visible_text import visible
from research.data.metric_sums import NATS_PER_TOKEN, by_group
from research.report.result_tables import is_text, loss_unit
from research.report.run_results import RunResults

# More lines cannot be told apart. The table has all groups.
MOST_GROUPS = 20
MOST_LETTERS = 40  # of a name


def draw_loss(results: RunResults, path: Path) -> None:
    """Draws `results` into a PNG file. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A name such as `$\R$` is text of the user, and no formula.
    with pyplot.rc_context({"text.parse_math": False, "text.usetex": False}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharex=True)
        try:
            _draw_all(left, results)
            _draw_groups(right, results.evaluations)
            figure.tight_layout()
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=120)
        finally:
            pyplot.close(figure)
    write_whole(path, picture.getvalue())


def _draw_all(axes: Any, results: RunResults) -> None:
    steps = [line["step"] for line in results.train]
    losses = [line["loss"] for line in results.train]
    held_steps = [line["step"] for line in results.evaluations]
    held = [line["loss"] for line in results.evaluations]
    axes.plot(steps, losses, color="0.75", linewidth=1, label="train, each step")
    axes.plot(steps, smoothed(losses), color="C0", label="train, smoothed")
    axes.plot(held_steps, held, "o-", color="C3", label="held out")
    unit = loss_unit(results.evaluations) or NATS_PER_TOKEN
    axes.set(xlabel="step", ylabel=f"loss, {unit}")
    axes.set_title(visible(results.name)[: 2 * MOST_LETTERS])
    axes.legend()
    _finish_axes(axes)


def _draw_groups(axes: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    text = is_text(evaluations)
    name = "bits_per_byte" if text else "loss"
    title = "held-out bits per byte" if text else "held-out loss per category"
    sizes: collections.Counter[str] = collections.Counter()
    for line in evaluations:
        sizes.update(dict.fromkeys(by_group(line, name), 0))
        sizes.update(by_group(line, "tokens"))
    groups = sorted(name for name, _ in sizes.most_common(MOST_GROUPS))
    if len(sizes) > len(groups):
        title += f", the {len(groups)} largest of {len(sizes)}"
    steps = [line["step"] for line in evaluations]
    drawn = []
    for group in groups:
        losses = [line.get(f"{name}/{group}", math.nan) for line in evaluations]
        drawn += axes.plot(steps, losses, "o-", markersize=3)
    axes.set(xlabel="step", title=title)
    if groups:
        # Names stand beside lines: a label that begins with "_" would be hidden.
        names = [visible(group)[:MOST_LETTERS] or "(none)" for group in groups]
        axes.legend(drawn, names, fontsize=8)
    _finish_axes(axes)


def _finish_axes(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def smoothed(values: Sequence[float], decay: float = 0.85) -> list[float]:
    """Exponential average, corrected for its start as in Adam (arXiv:1412.6980)."""
    average, weight, averages = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        averages.append(average / weight)
    return averages
