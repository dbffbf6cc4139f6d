"""A Slurm job: it saves before its time is over, is queued again and resumes."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.jobs import restart_policy
from launch.jobs.launch_flags import (
    add_grace,
    add_number,
    add_restarts,
    add_text,
    add_texts,
    at_least,
)
from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config
from research.core.errors import PREEMPTED, UserError, nearest
from research.core.text_templates import fill
from research.parallel.chips import CHIPS, find_chip

HELP = "a batch job on a Slurm cluster; JAX finds the nodes from Slurm's variables"
TOOLS: Mapping[str, str] = {"sbatch": "install Slurm's client (slurm-client on Debian)"}

# It has no #SBATCH lines: a name could pass for a directive there, and cannot in an
# argument of sbatch.
TEMPLATE = Path(__file__).parent / "templates/slurm.sh.jinja"
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|infinite|unlimited", re.IGNORECASE)


def _time_limit(text: str) -> str:
    """The type of `--time`, which sbatch would only refuse on the cluster."""
    if text and not TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time limit of Slurm: write hours:minutes:seconds, as "
            "4:00:00, days-hours, as 1-12, or minutes, as 90"
        )
    return text


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--nodes", "default: 1", 1, least=1)
    add_number(parser, "--processes-per-node", "default: 1", 1, least=1)
    gpus = "GPUs of each node; 0: the job is meant for CPUs"
    parser.add_argument("--gpus-per-node", type=at_least(0), default=None, help=gpus)
    add_text(
        parser,
        "--device",
        "the kind of GPU, such as h100; the launch then checks that the run fits",
    )
    limit = "time limit as sbatch writes it: 4:00:00"
    parser.add_argument("--time", type=_time_limit, default="", help=limit)
    add_grace(parser)
    add_restarts(parser)
    add_text(parser, "--partition", "default: the cluster's")
    add_text(parser, "--account", "default: the user's")
    add_text(parser, "--name", "default: the run directory's")
    add_texts(
        parser,
        "--sbatch",
        "FLAG",
        "another flag for sbatch, as --sbatch=--cpus-per-task=8; repeatable",
    )


def rents(options: argparse.Namespace) -> bool:
    """A job that cannot fit would wait in the queue and then fail."""
    return True


def chips(options: argparse.Namespace, config: Config) -> tuple[str, int] | None:
    """The GPUs of all nodes; None if `--device` does not name them."""
    if not options.device:
        return None
    known = [chip.name for chip in CHIPS.values() if chip.platform == "gpu"]
    chip = find_chip(options.device)
    if chip is None or chip.name not in known:
        raise UserError(
            f"--device is {options.device!r}{nearest(options.device, known)}; it is "
            f"one of {', '.join(known)}"
        )
    if not options.gpus_per_node:
        raise UserError(f"--device={options.device} needs --gpus-per-node")
    return f"{chip.name}:{options.nodes * options.gpus_per_node}", 1


def plan(jobs: Sequence[LaunchJob], options: argparse.Namespace) -> LaunchPlan:
    """Plans one Slurm job, or an array for several jobs."""
    first, several = jobs[0], len(jobs) > 1
    beside = first.file("").parent / "slurm-array" if several else first.beside
    if "\\" in str(beside):
        raise UserError(
            f"{beside} has a backslash, which Slurm removes from a log's name; choose "
            "another --config.run_dir"
        )
    script = beside.with_name(f"{beside.name}.slurm.sh")
    many = options.nodes * options.processes_per_node > 1
    commands = [
        job.setting_env(job.command(sys.executable, distributed=many)) for job in jobs
    ]
    over = restart_policy.FINAL | {PREEMPTED}
    text = fill(
        TEMPLATE,
        folder=shlex.quote(os.getcwd()),
        commands=map(shlex.join, commands),
        preempted=PREEMPTED,
        restarts=options.restarts,
        over=" | ".join(map(str, sorted(over))),
    )
    # Slurm expands % in a log's name, and %% to one %.
    log = str(beside).replace("%", "%%")
    chosen = {
        "job-name": options.name or (_sweep_name(beside) if several else first.name),
        "array": f"0-{len(jobs) - 1}" if several else "",
        "nodes": options.nodes,
        "ntasks-per-node": options.processes_per_node,
        "gpus-per-node": options.gpus_per_node or "",
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "signal": f"TERM@{options.grace}",
        # %A is the job: in another array the same index %a is another run.
        "output": f"{log}.slurm{'.%A.%a' if several else ''}.log",
        "open-mode": "append",
    }
    flags = [f"--{name}={value}" for name, value in chosen.items() if value != ""]
    flags += options.sbatch
    command = ["sbatch", "--requeue", *flags, str(script)]
    return LaunchPlan({script: text}, [command], notes=_notes(options))


def _notes(options: argparse.Namespace) -> list[str]:
    """Most clusters give a job no GPU that does not ask for one."""
    asked = ("--gpus", "--gres=gpu", "-G", "--tres-per-")
    chosen = options.gpus_per_node is not None
    if chosen or any(flag.startswith(asked) for flag in options.sbatch):
        return []
    return [
        "warning: the job asks for no GPU, so it trains on CPUs: add --gpus-per-node=N "
        "(and --device=h100, to check that it fits), or --gpus-per-node=0 if that is "
        "meant"
    ]


def _sweep_name(beside: Path) -> str:
    """The name of the sweep's folder, whose `logs` hold the files of the jobs."""
    folder = beside.parent
    return (folder.parent if folder.name == "logs" else folder).name


def run(plan: LaunchPlan, options: argparse.Namespace) -> int:
    return plan.submit()
