"""A plan as plain data: everything that `--json` writes and the terminal shows."""

import dataclasses
import json
import os
from typing import Any

from research.core.errors import UserError
from research.core.local_paths import local_path
from research.plan.planner import JAX_SHARE, USABLE, Plan

ASSUMED = (
    "rows full of one document each, every token trained: shorter documents and "
    "masked tokens cost less"
)


def to_json(plan: Plan, advice: str = "") -> dict[str, Any]:
    """The whole plan in plain values: bytes, seconds and counts, nothing rounded.

    `advice` says what to change if it does not fit; if a search has found the plan, the
    flags that make it.
    """
    chip = plan.target.chip
    return {
        "target": plan.target.name,
        "chip": chip.name,
        "chips": plan.target.count,
        "mesh": plan.mesh,
        "source": plan.source,
        "compile_seconds": plan.seconds,
        "remat": plan.config.model.remat,
        "steps": None if plan.config.epochs else plan.config.steps,
        "microbatch_rows": plan.micro_rows,
        "batch_rows": plan.config.data.batch_size,
        "seq_len": plan.config.data.seq_len,
        "parameters": {"trained": plan.trained, "frozen": plan.frozen},
        "frozen_forms": plan.frozen_forms,
        "memory": dataclasses.asdict(plan.memory) if plan.memory else None,
        "hbm_needed": plan.needed,
        "hbm_needed_by": plan.phase,
        "hbm_usable": chip.hbm,
        "hbm_share": plan.needed / chip.hbm,
        "hbm_share_limit": USABLE,
        "fits": plan.fits,
        "advice": advice,
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
        "notes": _notes(plan),
        "assumed": ASSUMED,
        "chip_source": chip.source,
    }


def _notes(plan: Plan) -> list[str]:
    """The limits of this plan, one sentence each."""
    chip = plan.target.chip
    several_hosts = not chip.shapes and plan.target.count > chip.hosted
    notes = {
        f"{chip.name} is a memory, not a chip: fit is judged, speed is not known": (
            chip.platform == "gpu" and not chip.flops
        ),
        f"not counted: traffic between hosts of {chip.name}, because its network is "
        "not known": several_hosts and not chip.network,
        f"JAX takes {JAX_SHARE:.0%} of a GPU by itself: set {plan.setting}, as launch "
        "does where it knows the GPU": bool(plan.setting),
        "compute is that of the last part of each row, which attends to the most": (
            plan.mesh.get("context", 1) > 1
        ),
        "not counted: the time to move the optimizer's state from and to the host": (
            plan.config.runtime.offload_optimizer
        ),
        f"{plan.config.epochs:g} epochs are as many steps as the data fills, which no "
        "plan reads: set --config.epochs=0 --config.steps=NUMBER for the time of the "
        "whole run": bool(plan.config.epochs),
        "the peak is that of bfloat16; float32 products are slower": (
            plan.config.model.dtype == "float32"
        ),
        f"products of bytes count as slow as those of bfloat16: how fast {chip.name} "
        "does them is not known": bool(plan.flops.in_bytes) and not chip.int8_flops,
    }
    return [note for note, applies in notes.items() if applies]


def check_json(path: str) -> None:
    """Checks before minutes of compiling whether `write_json` could write there.

    Raises:
      UserError: it could not.
    """
    file = local_path(path)
    holder = file if file.exists() else file.parent
    # A file may be written to, and yet hold no other one.
    kind_fits = file.is_file() if file.exists() else holder.is_dir()
    if not kind_fits or not os.access(holder, os.W_OK):
        raise UserError(f"--json={path} cannot be written: no folder, or no permission")


def write_json(path: str, plans: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes one plan as an object, or the plans of a search as a list.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        local_path(path).write_text(
            json.dumps(plans, indent=2) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error}") from error
