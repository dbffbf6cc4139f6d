"""`loss.png`: training and held-out loss over the steps, in all and by group."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from research.core.visible_text import visible
from research.data.grouped_values import NATS_PER_TOKEN, UNNAMED, by_group
from research.report.result_tables import TOTAL, group_kind, group_label, loss_unit
from research.report.run_results import RunResults

# So many lines can be told apart. If there are more, both ends have names, and
# the table has all.
MOST_GROUPS, EXTREMES = 10, 4
MOST_LETTERS = 40  # of a name
WIDTH, HEIGHT, LEGEND_ROW = 12.0, 4.5, 0.22  # inches; the legend comes on top
# A window reaches over one of so many parts of the run, to each side, and at most over
# so many steps: its cost grows with its length.
SMOOTHED, LONGEST = 40, 1000


def draw_loss(results: RunResults) -> bytes:
    """The PNG file of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A name such as `$\R$` is text of the user, and no formula.
    with pyplot.rc_context({"text.parse_math": False, "text.usetex": False}):
        count = len(_plots(results))
        figure, axes = pyplot.subplots(
            1, count, figsize=(WIDTH * count / 2, HEIGHT), sharex=True,
            layout="constrained", squeeze=False,
        )  # fmt: skip
        try:
            _draw(figure, axes[0], results)
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=120)
        finally:
            pyplot.close(figure)
    return picture.getvalue()


def _draw(figure: Any, axes: Sequence[Any], results: RunResults) -> None:
    """The plots, each with its legend below it, so that no line is hidden."""
    from matplotlib.ticker import MaxNLocator

    figure.suptitle(_cut(results.name))
    rows = 0
    for one, draw in zip(axes, _plots(results), strict=True):
        lines = draw(one, results)
        # Names stand beside lines: a label that begins with "_" would be hidden.
        names = [_cut(name) for name, _ in lines]
        columns = max(1, min(4, 80 // (6 + max(map(len, names), default=0))))
        if names:
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
            form = {"ncols": columns, "fontsize": 8, "frameon": False}
            one.legend([line for _, line in lines], names, **place, **form)
        rows = max(rows, math.ceil(len(names) / columns))
        one.set(xlabel="step")
        one.grid(alpha=0.3)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.set_figheight(HEIGHT + LEGEND_ROW * rows)


def _plots(results: RunResults) -> list[Callable[..., list[tuple[str, Any]]]]:
    """The functions that draw one plot each; without groups, the first says it all."""
    return [_draw_all, _draw_groups] if _groups(results) else [_draw_all]


def _groups(results: RunResults) -> list[str]:
    """All groups that were evaluated; empty if no row has a category."""
    names = {x for line in results.evaluations for x in by_group(line, "loss")}
    return [] if names == {UNNAMED} else sorted(names)


def _draw_all(axes: Any, results: RunResults) -> list[tuple[str, Any]]:
    """Draws the losses over everything; returns the lines with their names."""
    steps = [line["step"] for line in results.train]
    losses = [line["loss"] for line in results.train]
    held_steps = [line["step"] for line in results.evaluations]
    held = [line["loss"] for line in results.evaluations]
    axes.set(ylabel=f"loss, {loss_unit(results.evaluations) or NATS_PER_TOKEN}")
    axes.set_title(TOTAL)
    lines = [
        ("train, each step", *axes.plot(steps, losses, color="0.8", linewidth=1)),
        ("train, smoothed", *axes.plot(steps, smoothed(losses), color="C0")),
    ]
    if held:
        (line,) = axes.plot(held_steps, held, "o-", color="C3", markersize=4)
        lines.append(("held out", line))
    return lines


def _draw_groups(axes: Any, results: RunResults) -> list[tuple[str, Any]]:
    """Draws the held-out losses by group; returns lines with their names."""
    evaluations = results.evaluations
    kind = group_kind(evaluations)
    name = "bits_per_byte" if kind == "source" else "loss"
    title = f"held-out {'bits per byte' if kind == 'source' else 'loss'} by {kind}"
    steps = [line["step"] for line in evaluations]
    groups = _groups(results)
    curves = {
        group: [by_group(line, name).get(group, math.nan) for line in evaluations]
        for group in groups
    }
    lines: list[tuple[str, Any]] = []
    named = groups
    if len(groups) > MOST_GROUPS:
        named = _extremes(evaluations[-1], name)
        title += f": highest and lowest {EXTREMES} of {len(groups)}"
        for curve in curves.values():
            (other,) = axes.plot(steps, curve, color="0.8", linewidth=0.8)
        mean = [line.get(name, math.nan) for line in evaluations]
        lines.append(
            (TOTAL, *axes.plot(steps, mean, "o-", color="black", markersize=3))
        )
        lines.append((f"{len(groups) - len(named)} others", other))
    for group in named:
        label = group_label(group, kind)
        lines.append((label, *axes.plot(steps, curves[group], "o-", markersize=3)))
    axes.set_title(title)
    return lines


def _extremes(last: Mapping[str, Any], name: str) -> list[str]:
    """The groups with the highest and the lowest values, from high to low."""
    values = by_group(last, name)
    groups = sorted(values, key=lambda group: values[group], reverse=True)
    if len(groups) <= 2 * EXTREMES:
        return groups
    return groups[:EXTREMES] + groups[-EXTREMES:]


def _cut(name: str) -> str:
    """`name` with its middle left away where it is long: the ends tell names apart."""
    name = visible(name)
    if len(name) <= MOST_LETTERS:
        return name
    return f"{name[: MOST_LETTERS - 18]}...{name[-15:]}"


def smoothed(values: Sequence[float]) -> list[float]:
    """Means of a window around each value; at both ends, a line through the window.

    Both follow a trend without a lag, while an exponential average would lie above a
    falling loss (Savitzky and Golay 1964, with polynomials of degree 1). A value that
    is not finite is taken from a line between its neighbours.
    """
    from scipy.signal import savgol_filter

    known = np.flatnonzero(np.isfinite(values))
    if len(known) < 3:
        return list(values)
    filled = np.interp(np.arange(len(values)), known, np.asarray(values)[known])
    reach = max(2, min(len(values) // SMOOTHED, LONGEST))
    reach = min(reach, (len(values) - 1) // 2)
    return savgol_filter(filled, 2 * reach + 1, 1).tolist()
