"""Print what large jobs need from TPU pods: the table of the README, as Markdown.

    python tests/bench/plans.py              estimated by formula, in seconds
    python tests/bench/plans.py --compile    by the compiler, with libtpu installed

Each row is what `python -m research.plan` says of a shipped config with other flags.
The last rows are one job on more and more chips, two rows of 8,192 tokens on each.
"""

import argparse
import dataclasses
import importlib
import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from research.config.run_config import Config, MeshConfig, from_config_dict
from research.models.presets import PRESETS
from research.plan import planner
from research.plan.compiled import compile_step
from research.plan.compiled.libtpu_environment import ENVIRONMENT
from research.plan.planned_devices import parse_topology
from research.plan.planner import Plan


@dataclasses.dataclass(frozen=True)
class PlannedJob:
    """One plan: a shipped config, changed in its model, mesh and rows."""

    job: str
    config: str
    preset: str
    topology: str
    batch: int
    micro: int
    slices: int = 1
    trainable: str = ""

    def read(self) -> Config:
        module = importlib.import_module(f"configs.{self.config}")
        config = from_config_dict(module.get_config())
        return dataclasses.replace(
            config,
            trainable=self.trainable or config.trainable,
            mesh=MeshConfig(replica=self.slices, data=1, fsdp=-1),
            data=dataclasses.replace(
                config.data, batch_size=self.batch, microbatch_size=self.micro
            ),
        )


JOBS = (
    PlannedJob("LoRA 8B", "finetune_8b", "llama3.1-8b", "v5e:4x4", 32, 16),
    PlannedJob("LoRA 70B", "finetune_8b", "llama3.1-70b", "v6e:8x8", 64, 64),
    PlannedJob("full 8B", "finetune_8b", "llama3.1-8b", "v6e:8x8", 64, 64, 1, "full"),
    PlannedJob("pre-train 8B", "pretrain_8b", "llama3.1-8b", "v6e:16x16", 512, 256),
    PlannedJob("pre-train 70B", "pretrain_8b", "llama3.1-70b", "v5p:4x8x8", 1024, 256),
    PlannedJob(
        "pre-train 70B", "pretrain_8b", "llama3.1-70b", "v5p:4x4x8", 1024, 256, 2
    ),
)
GROWING = tuple(
    PlannedJob("pre-train 8B", "pretrain_8b", "llama3.1-8b", f"v5p:{shape}", rows, rows)
    for shape, rows in (
        ("2x2x4", 32), ("4x8x8", 512), ("16x16x16", 8192)
    )
)  # fmt: skip


def make_plan(row: PlannedJob, compiling: bool) -> Plan:
    target = parse_topology(row.topology, row.slices)
    arguments = (row.read(), PRESETS[row.preset], target)
    if compiling:
        devices = compile_step.topology_devices(target)
        return planner.plan_compiled(*arguments, devices)
    return planner.plan_estimate(*arguments)


def show(row: PlannedJob, plan: Plan) -> None:
    fits = f"{plan.needed / 2**30:.1f} of {plan.target.chip.hbm / 2**30:.1f}"
    line = plan.roofline
    sent = sum(traffic.nbytes for traffic in plan.traffic) / 2**30
    cells = (
        row.job,
        f"{plan.target.name} ({plan.target.count})",
        fits if plan.fits else f"**{fits}**",
        f"{sent:.0f}",
        f"{line.compute:.2f} / {line.hbm:.2f} / {line.ici:.2f} / {line.dcn:.2f}",
        f"{plan.worst.mfu:.0%} to {plan.best.mfu:.0%}",
        f"{plan.worst.tokens_per_second:,.0f} to {plan.best.tokens_per_second:,.0f}",
    )
    print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="with libtpu")
    compiling = parser.parse_args().compile
    os.environ |= ENVIRONMENT
    logging.getLogger("absl").setLevel(logging.ERROR)
    names = "job", "chips", "GiB a chip", "GiB sent", "compute / HBM / ICI / DCN, s"
    print("|", " | ".join((*names, "MFU", "tokens/s")), "|")
    print("|---|---|" + "---:|" * 5)
    for row in (*JOBS, *GROWING):
        begun = time.monotonic()
        show(row, make_plan(row, compiling))
        print(f"planned in {time.monotonic() - begun:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
