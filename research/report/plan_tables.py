"""Plans in the terminal, from the data that `research.plan --json` writes."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from research.core.visible_text import counted

PlanData = dict[str, Any]  # `research.plan.plan_json.to_json` lists the fields.

DeviceTable = list[list[str]]  # A header, and a row for each plan.

MEANINGS = {
    "frozen": "parameters that are not trained",
    "trained": "parameters that are trained",
    "optimizer": "the optimizer's moments and counters",
    "batch": "the batch of one step",
    "temporaries": "activations, gradients, gathered weights",
    "padding": "padding of all arguments to the chip's tiles",
    "program": "the compiled program",
}
PARTS = {
    "compute": "all products at the chip's peak",
    "hbm": "reads and writes of its memory",
    "ici": "collectives within a slice or host",
    "dcn": "collectives over the network",
}


def show_plan(console: Console, plan: PlanData) -> None:
    """Everything about one plan."""
    trained, frozen = (plan["parameters"][x] / 1e6 for x in ("trained", "frozen"))
    made = plan["source"]
    if plan["compile_seconds"]:
        made += f" in {plan['compile_seconds']:.0f} s"
    console.print(
        Text.assemble(
            (plan["target"], "bold"),
            f", {counted(plan['chips'], 'chip')}, mesh {_mesh(plan)}; {trained:,.1f} M "
            f"parameters trained, {frozen:,.1f} M frozen; "
            f"{counted(plan['batch_rows'], 'row')} of {plan['seq_len']} a step in "
            f"passes of {plan['microbatch_rows']}, remat {plan['remat']} ({made})",
        )
    )
    if plan["memory"]:
        console.print(_memory_table(plan))
    console.print(_verdict(plan), soft_wrap=True)
    if plan["collectives"]:
        console.print(_collectives_table(plan))
    if plan["roofline"]["overlapped"]:
        console.print(_time_table(plan))
    _show_prediction(console, plan)


def _verdict(plan: PlanData) -> Text:
    sizes = f"{_size(plan['hbm_needed'])} of {_size(plan['hbm_usable'])}"
    share = f"{sizes}, {plan['hbm_share']:.0%}"
    if plan["hbm_needed_by"] != "step":
        share += f", for {plan['hbm_needed_by']}"
    if plan["fits"]:
        return Text.assemble(("fits", "bold green"), f": {share}")
    share += f"; at most {plan['hbm_share_limit']:.0%} should be used"
    share += f"\n{plan['advice']}" if plan["advice"] else ""
    return Text.assemble(("does not fit", "bold red"), f": {share}")


def _memory_table(plan: PlanData) -> Table:
    table = _table("bytes per chip", "", "size", "share", "what")
    for name, value in plan["memory"].items():
        if value:
            share = f"{value / plan['hbm_usable']:.1%}"
            what = MEANINGS[name]
            if name == "frozen":
                forms = plan["frozen_forms"].items()
                what += f" ({', '.join(f'{x} {_size(n)}' for x, n in forms)})"
            table.add_row(name, _size(value), share, what)
    return table


def _collectives_table(plan: PlanData) -> Table:
    table = _table("collectives of a step, per chip", "kind", "axes", "count", "bytes")
    for row in plan["collectives"]:
        count, size = f"{row['count']:,.0f}", _size(row["nbytes"])
        table.add_row(row["kind"], row["axes"], count, size)
    return table


def _time_table(plan: PlanData) -> Table:
    table = _table("a step at best", "", "seconds", "share", "what")
    longest = plan["roofline"]["overlapped"]
    for name, meaning in PARTS.items():
        value = plan["roofline"][name]
        if value:
            table.add_row(name, f"{value:.4g}", f"{value / longest:.0%}", meaning)
    return table


def _show_prediction(console: Console, plan: PlanData) -> None:
    flops, best, worst = plan["flops"], plan["best"], plan["not_overlapped"]
    lines = [
        f"FLOPs of a step: {flops['model']:.3g} for the model, "
        f"{flops['recomputed']:.3g} again in the backward pass (remat {plan['remat']})"
    ]
    if plan["roofline"]["overlapped"]:
        mfu = _between(f"{worst['mfu']:.1%}", f"{best['mfu']:.1%}")
        speeds = [f"{x['tokens_per_second']:,.0f}" for x in (worst, best)]
        lines += [
            f"bound by {plan['roofline']['bound_by']}; MFU at best {mfu}, tokens/s "
            f"{_between(*speeds)} (from no overlap to all)",
        ]
        if plan["steps"] is not None:
            times = [_format_days(x["days"]) for x in (best, worst)]
            hours = [f"{x['chip_hours']:,.1f}" for x in (best, worst)]
            lines.append(
                f"{counted(plan['steps'], 'step')}: {_between(*times)}, "
                f"{_between(*hours)} chip-hours"
            )
    lines += plan["notes"]
    console.print(Text("\n".join(lines)))
    console.print(Text(f"assumed: {plan['assumed']}", "dim"))


def tabulate_devices(
    plans: Sequence[PlanData], prices: Sequence[float | None] = ()
) -> DeviceTable:
    """A row for each plan: does it fit, how long does it take, what does it cost.

    Args:
      plans: of one config on several kinds of chips; one that cannot be made has a
        `problem` instead.
      prices: of an hour of one chip, in any currency; None or no price: no cost.
    """
    has_cost = any(price is not None for price in prices)
    header = ["chips", "fits", "GiB of a chip", "a step", "tokens/s", "whole run"]
    rows = [[*header, "chip-hours", *["cost"] * has_cost, "what to know"]]
    for index, plan in enumerate(plans):
        price = prices[index] if index < len(prices) else None
        if "problem" in plan:
            dashes = ["-"] * (len(rows[0]) - 2)
            rows.append([plan["target"], *dashes, plan["problem"]])
            continue
        best, worst = plan["best"], plan["not_overlapped"]
        sizes = [plan[x] / 2**30 for x in ("hbm_needed", "hbm_usable")]
        size = " of ".join(f"{x:,.1f}" for x in sizes)
        cells = [plan["target"], "yes" if plan["fits"] else "no", size]
        cells += ["-"] * (len(rows[0]) - 4)
        if best["seconds"]:
            cells[3] = _range([f"{x['seconds']:.3g}" for x in (best, worst)]) + " s"
            cells[4] = _range([f"{x['tokens_per_second']:,.0f}" for x in (worst, best)])
        if best["seconds"] and plan["steps"] is not None:
            cells[5] = _range([_format_days(x["days"]) for x in (best, worst)])
            hours = [x["chip_hours"] for x in (best, worst)]
            cells[6] = _range([_amount(x) for x in hours])
            if price is not None:
                cells[7] = _range([_amount(price * x) for x in hours])
        notes = [plan["advice"] if not plan["fits"] else "", *plan["notes"]]
        rows.append([*cells, "; ".join(filter(None, notes))])
    return rows


def show_devices(console: Console, plans: Sequence[PlanData]) -> None:
    """Plans of one config on several kinds of chips."""
    header, *rows = tabulate_devices(plans)
    # A terminal of 80 columns has no room for the time of a step.
    shown = [i for i, name in enumerate(header[:-1]) if name != "a step"]
    title = "with all compute and traffic overlapped, to none"
    table = _table(title, *(header[i] for i in shown))
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    for row in rows:
        if row[-1]:
            console.print(Text(f"{row[0]}: {row[-1]}"), soft_wrap=True)


def show_search(console: Console, plans: Sequence[PlanData], refused: int) -> None:
    """Plans beside each other, the fastest that fits first; the search has tried and
    `refused` so many more.
    """
    order = "fastest" if plans[0]["best"]["seconds"] else "least computation"
    table = _table(
        f"layouts on {plans[0]['target']}, the {order} that fit first",
        "mesh", "remat", "rows", "HBM", "MFU", "bound", "takes", "by",
    )  # fmt: skip
    for plan in plans:
        table.add_row(
            _mesh(plan),
            plan["remat"],
            str(plan["microbatch_rows"]),
            Text(f"{plan['hbm_share']:.0%}", "" if plan["fits"] else "red"),
            f"{plan['not_overlapped']['mfu']:.0%}-{plan['best']['mfu']:.0%}"
            if plan["best"]["mfu"]
            else "-",
            plan["roofline"]["bound_by"] if plan["roofline"]["overlapped"] else "-",
            _format_days(plan["best"]["days"]) if plan["best"]["days"] else "-",
            plan["source"],
        )
    console.print(table)
    if not plans[0]["fits"]:
        none_fits = ("none fits", "bold red")
        console.print(Text.assemble(none_fits, "; the one that needs least is shown"))
        console.print(Text(plans[0]["advice"]), soft_wrap=True)
    elif plans[0]["advice"]:
        console.print(Text(f"the first: {plans[0]['advice']}"), soft_wrap=True)
    lines = [
        "rows: the largest micro-batch that fits; MFU: from no overlap to all; takes: "
        "at best"
    ]
    if refused:
        lines.append(
            f"{refused} more are slower, do not fit or do not divide the model"
        )
    console.print(Text("\n".join(lines)))


def _mesh(plan: PlanData) -> str:
    return " ".join(f"{axis}={n}" for axis, n in plan["mesh"].items()) or "one device"


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def _range(values: Sequence[str]) -> str:
    return "-".join(dict.fromkeys(values))


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        words = column in ("", "kind", "axes", "what", "mesh", "remat", "bound", "by")
        side = "left" if words else "right"
        # Long words are wrapped, and not cut.
        table.add_column(column, justify=side, no_wrap=not words, overflow="fold")
    return table


def _size(nbytes: float) -> str:
    if nbytes >= 2**30 / 100:
        return f"{nbytes / 2**30:,.2f} GiB"
    return f"{nbytes / 2**20:,.2f} MiB"


def _format_days(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} d"
    hours = 24 * days
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
