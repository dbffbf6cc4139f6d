"""Plans as tables for people and as JSON for programs."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from research.core.errors import UserError
from research.plan.planner import USABLE, Plan

MEANINGS = {
    "frozen": "parameters that are not trained",
    "trained": "parameters that are",
    "optimizer": "its moments and counters",
    "batch": "of one step",
    "temporaries": "activations, gradients, gathered weights",
    "padding": "of all arguments, to the chip's tiles",
    "program": "the code",
}
PARTS = {
    "compute": "all products at the chip's peak",
    "hbm": "reads and writes of its memory",
    "ici": "collectives within a slice or host",
    "dcn": "collectives over the network",
}
ASSUMED = (
    "rows full of one document each, every token trained: shorter documents and "
    "masked tokens cost less"
)


def to_json(plan: Plan) -> dict[str, Any]:
    """The whole plan in plain values; bytes, seconds and counts, nothing rounded."""
    chip = plan.target.chip
    return {
        "target": plan.target.name,
        "chip": chip.name,
        "chips": plan.target.count,
        "mesh": plan.mesh,
        "source": plan.source,
        "compile_seconds": plan.seconds,
        "remat": plan.config.model.remat,
        "microbatch_rows": plan.micro_rows,
        "batch_rows": plan.config.data.batch_size,
        "seq_len": plan.config.data.seq_len,
        "parameters": {"trained": plan.trained, "frozen": plan.frozen},
        "memory": dataclasses.asdict(plan.memory) if plan.memory else None,
        "hbm_needed": plan.needed,
        "hbm_usable": chip.hbm,
        "hbm_share": plan.needed / chip.hbm,
        "fits": plan.fits,
        "collectives": [dataclasses.asdict(row) for row in plan.traffic],
        "flops": dataclasses.asdict(plan.flops),
        "roofline": {
            **dataclasses.asdict(plan.roofline),
            "overlapped": plan.roofline.overlapped,
            "not_overlapped": plan.roofline.summed,
            "bound_by": plan.roofline.bound_by,
        },
        "best": dataclasses.asdict(plan.best),
        "not_overlapped": dataclasses.asdict(plan.worst),
        "assumed": ASSUMED,
        "chip_source": chip.source,
    }


def check_json(path: str) -> None:
    """Before minutes of compiling: whether `write_json` could write there.

    Raises:
      UserError: not so.
    """
    file = Path(path)
    holder = file if file.exists() else file.parent
    # A file may be written to, and yet hold no other one.
    kind_fits = file.is_file() if file.exists() else holder.is_dir()
    if not kind_fits or not os.access(holder, os.W_OK):
        raise UserError(f"--json={path} cannot be written: no folder, or no permission")


def write_json(path: str, plans: Plan | list[Plan]) -> None:
    """One plan as an object, those of a search as a list, however many it found.

    Raises:
      UserError: the file cannot be written.
    """
    is_list = isinstance(plans, list)
    values = [to_json(plan) for plan in plans] if is_list else to_json(plans)
    text = json.dumps(values, indent=2)
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error}") from error


def show(console: Console, plan: Plan) -> None:
    """Everything about one plan."""
    data, chip = plan.config.data, plan.target.chip
    console.print(
        f"[bold]{plan.target.name}[/], {plan.target.count} chips, mesh {_mesh(plan)}; "
        f"{plan.trained / 1e6:,.1f} M parameters trained, {plan.frozen / 1e6:,.1f} M "
        f"frozen; {data.batch_size} rows of {data.seq_len} a step in passes of "
        f"{data.rows_per_pass}, remat {plan.config.model.remat} ({plan.source}"
        + (f" in {plan.seconds:.0f} s)" if plan.seconds else ")"),
        highlight=False,
    )
    if plan.memory:
        console.print(_memory_table(plan))
    share = f"{_size(plan.needed)} of {_size(chip.hbm)}, {plan.needed / chip.hbm:.0%}"
    if plan.fits:
        verdict = f"[bold green]fits[/]: {share}"
    else:
        verdict = (
            f"[bold red]does not fit[/]: {share}, and at most {USABLE:.0%} should be; "
            "try more fsdp or tensor, smaller config.data.microbatch_size, or "
            "config.model.remat=full"
        )
    console.print(verdict, highlight=False)
    if plan.traffic:
        console.print(_collectives_table(plan))
    console.print(_time_table(plan))
    _show_prediction(console, plan)


def _memory_table(plan: Plan) -> Table:
    table = _table("bytes per chip", "", "size", "share", "what")
    for name, value in dataclasses.asdict(plan.memory).items():
        if value:
            share = f"{value / plan.target.chip.hbm:.1%}"
            table.add_row(name, _size(value), share, MEANINGS[name])
    return table


def _collectives_table(plan: Plan) -> Table:
    table = _table("collectives of a step, per chip", "kind", "axes", "count", "bytes")
    for row in plan.traffic:
        table.add_row(row.kind, row.axes, f"{row.count:,.0f}", _size(row.nbytes))
    return table


def _time_table(plan: Plan) -> Table:
    table = _table("a step at best", "", "seconds", "share", "what")
    longest = plan.roofline.overlapped
    for name, value in dataclasses.asdict(plan.roofline).items():
        if value:
            share = f"{value / longest:.0%}"
            table.add_row(name, f"{value:.4g}", share, PARTS[name])
    return table


def _show_prediction(console: Console, plan: Plan) -> None:
    flops, best, worst = plan.flops, plan.best, plan.worst
    lines = [
        f"FLOPs of a step: {flops.model:.3g} for the model, {flops.recomputed:.3g} "
        f"again in the backward pass (remat {plan.config.model.remat})"
    ]
    if plan.roofline.overlapped:
        mfu = _between(f"{worst.mfu:.1%}", f"{best.mfu:.1%}")
        speeds = [f"{p.tokens_per_second:,.0f}" for p in (worst, best)]
        times = [_duration(p.days) for p in (best, worst)]
        hours = [f"{p.chip_hours:,.1f}" for p in (best, worst)]
        lines += [
            f"bound by {plan.roofline.bound_by}; MFU at best {mfu}, tokens/s "
            f"{_between(*speeds)} (from no overlap to all)",
            f"{plan.config.steps:,} steps take {_between(*times)}, "
            f"{_between(*hours)} chip-hours",
        ]
    if plan.mesh.get("context", 1) > 1:
        lines.append(
            "compute is that of the last part of each row, which attends to the most"
        )
    if plan.config.runtime.offload_optimizer:
        lines.append(
            "not counted: the time that the optimizer's state takes from the host's "
            "memory and back"
        )
    if plan.config.model.dtype == "float32":
        lines.append("the peak is that of bfloat16; float32 products are slower")
    lines.append(f"[dim]assumed: {ASSUMED}[/]")
    console.print("\n".join(lines), highlight=False)


def show_search(console: Console, plans: list[Plan], refused: int) -> None:
    """Plans beside each other, the fastest that fits first."""
    table = _table(
        f"layouts on {plans[0].target.name}, the fastest that fit first",
        "mesh", "remat", "rows", "HBM", "MFU", "bound", "takes", "by",
    )  # fmt: skip
    for plan in plans:
        share = f"{plan.needed / plan.target.chip.hbm:.0%}"
        table.add_row(
            _mesh(plan),
            plan.config.model.remat,
            str(plan.micro_rows),
            share if plan.fits else f"[red]{share}[/]",
            f"{plan.worst.mfu:.0%}-{plan.best.mfu:.0%}",
            plan.roofline.bound_by,
            _duration(plan.best.days),
            plan.source,
        )
    console.print(table)
    lines = [
        "rows: the largest micro-batch that fits; MFU: from no overlap to all; takes: "
        "at best"
    ]
    if not plans[0].fits:
        lines.insert(0, "[bold red]none fits[/]; the one that needs least is shown")
    if refused:
        lines.append(
            f"{refused} more are slower, do not fit or do not divide the model"
        )
    console.print("\n".join(lines), highlight=False)


def _mesh(plan: Plan) -> str:
    return " ".join(f"{axis}={n}" for axis, n in plan.mesh.items()) or "one device"


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


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
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table


def _size(nbytes: float) -> str:
    if nbytes >= 2**30 / 100:
        return f"{nbytes / 2**30:,.2f} GiB"
    return f"{nbytes / 2**20:,.2f} MiB"


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} d"
    hours = 24 * days
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
