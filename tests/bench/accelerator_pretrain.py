"""MFU of the 1B pre-training step in bf16 on one accelerator.

    python tests/bench/accelerator_pretrain.py

Sweeps what a backward pass recomputes and the rows of a pass, each in a process of its
own, until memory runs out; then the other attention kernels that work here at the best
of these. `--rows` is what one of 16 devices gets of the config's batch. Random tokens,
every row one document, every position trained. Recomputation counts for nothing in
MFU. The goal is 50 % on one H100, whose peak is 989 TFLOP/s.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trials
from random_step import read_config
from trials import Device, Trial

from research.config import command_line
from research.core.errors import UserError
from research.models import attention_kernels
from research.plan.abstract_step import find_architecture

GOAL = 0.5


def working_kernels(arguments: argparse.Namespace, device: Device) -> list[str]:
    """Attention kernels that can compute the config's rows here, the best one first."""
    config = read_config(arguments.config, {"data.seq_len": arguments.seq})
    width = find_architecture(config, arguments.preset).head_dim

    def choose(kernel: str) -> str:
        return attention_kernels.choose(
            kernel,
            device.platform,
            dtype=config.model.dtype,
            head_dim=width,
            length=arguments.seq,
            capability=device.capability,
        ).kernel

    found = [choose("auto")]
    for kernel in attention_kernels.KERNELS:
        try:
            found.append(choose(kernel))
        except UserError:
            continue
    return list(dict.fromkeys(found))


def show(trial: Trial, kernel: str) -> Trial:
    """A row of the table."""
    setting = trial.way, str(trial.micro), kernel
    if trial.found is None:
        trials.row(*setting, trial.failure, "", "", "", "")
        return trial
    found = trial.found
    trials.row(
        *setting,
        f"{found['tokens_per_s']:,.0f}",
        f"{found['step_s']:.3f}",
        f"{found['flops_per_s'] / 1e12:.1f}",
        "-" if found["mfu"] is None else f"{found['mfu']:.1%}",
        f"{found['memory_gb']:.1f}",
    )
    return trial


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trials.add_common(parser, config="configs/pretrain_1b.py", rows=32)
    arguments = parser.parse_args(argv[1:])
    sizes = trials.sizes(arguments)
    device = trials.find_device(arguments.preset)
    first, *others = working_kernels(arguments, device)

    def run(kernel: str, way: str, micro: int) -> Trial:
        knobs = f"model.remat={way}", f"model.attention={kernel}"
        command = trials.our_step(arguments, micro, *knobs)
        return show(
            trials.run_trial(way, micro, command, ours=True, timeout=arguments.timeout),
            kernel,
        )

    names = "remat", "rows a pass", "attention", "tokens/s", "s a step", "TFLOP/s"
    trials.head(device, *names, "MFU", "GB")
    ways = arguments.remat.split(",")
    done = list(trials.sweep(lambda *at: run(first, *at), ways, sizes))
    fastest, kernel = trials.best(done, "ours"), first
    for other in others:
        trial = run(other, fastest.way, fastest.micro)
        if trial.speed > fastest.speed:
            fastest, kernel = trial, other
    mfu = (fastest.found or {})["mfu"]
    print(
        f"\nbest on {device.kind}: MFU {'-' if mfu is None else f'{mfu:.1%}'} (goal "
        f"{GOAL:.0%}), {fastest.speed:,.0f} tokens/s with remat {fastest.way}, "
        f"{fastest.micro} rows a pass, attention {kernel}"
    )


if __name__ == "__main__":
    command_line.run(main)
