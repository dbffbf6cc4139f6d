"""A managed job of SkyPilot, which chooses a cloud and recovers preempted jobs.

Sources: https://docs.skypilot.co/en/latest/reference/yaml-spec.html (version 0.14:
`job_recovery.recover_on_exit_codes` restarts without counting a failure, `workdir` is
uploaded as it is on disk, and `--secret NAME` gives a secret without a value), and
https://docs.skypilot.co/en/latest/running-jobs/distributed-jobs.html (the hosts of a
TPU slice count as nodes). Processes find each other by
`research/parallel/process_discovery.py`.
"""

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from launch.clouds import remote_jobs, tpu_slices
from launch.jobs.launch_flags import add_number, add_restarts, add_switch, add_text
from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config
from research.core.errors import PREEMPTED, UserError
from research.parallel.chips import find_chip
from research.runs import provenance

HELP = "a managed job of SkyPilot, on TPUs or GPUs of any cloud it knows"
TOOLS: Mapping[str, str] = {"sky": 'pip install "skypilot[gcp]", then sky check'}
MOUNT = "/mnt/research"
# SkyPilot mounts gs:// with gcsfuse, which can rename folders as checkpoints need.
BUCKET = re.compile(r"gs://[a-z0-9][-a-z0-9_.]*[a-z0-9]")
ENVIRONMENT = '"$HOME/research-env"'


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_text(
        parser,
        "--accelerators",
        "H100:8 or tpu-v5litepod-16; default: from config.runtime.topology",
    )
    add_number(parser, "--nodes", "GPU nodes; default: 1", 1, least=1)
    add_text(parser, "--infra", "gcp/us-west4; default: any")
    add_switch(parser, "--spot", "use machines that may be preempted")
    add_text(parser, "--bucket", "gs://NAME for run directories; required")
    # SkyPilot would also restart a run that a person must fix.
    add_restarts(parser, default=0)
    remote_jobs.add_secret_flag(
        parser, "environment variable of this shell to pass to the job"
    )


def rents(options: argparse.Namespace) -> bool:
    return True


def chips(options: argparse.Namespace, config: Config) -> tuple[str, int] | None:
    """The chips of the nodes; None for GPUs that are not known."""
    if chosen := _slice(options, config):
        return chosen.name, 1
    name, _, count = options.accelerators.partition(":")
    # SkyPilot's A100 has 40 GB.
    chip = find_chip("a100-40" if name.lower() == "a100" else name)
    if chip is None or not (count or "1").isdigit():
        return None
    return f"{chip.name}:{int(count or 1) * options.nodes}", 1


def plan(jobs: Sequence[LaunchJob], options: argparse.Namespace) -> LaunchPlan:
    """Plans a managed job for each job."""
    remote_jobs.check_secrets(options.secret)
    if not BUCKET.fullmatch(options.bucket):
        raise UserError(
            f"--bucket is {options.bucket!r}; a machine's disk is deleted with it: "
            "name a bucket for run directories, gs://NAME"
        )
    files, commands = {}, []
    secrets = [flag for secret in options.secret for flag in ("--secret", secret)]
    for name, job in zip(remote_jobs.names(jobs), jobs, strict=True):
        there = remote_jobs.stored(remote_jobs.portable(job, "skypilot"), MOUNT)
        file = job.file(".sky.yaml")
        files[file] = yaml.dump(
            task(name, there, options),
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
        )
        commands.append(
            ["sky", "jobs", "launch", "--yes", "--detach-run", *secrets, str(file)]
        )
    return LaunchPlan(files, commands)


def run(plan: LaunchPlan, options: argparse.Namespace) -> int:
    """Submits the jobs; `sky jobs queue` and `sky jobs logs` then show them."""
    absent = [name for name in options.secret if name not in os.environ]
    if absent:
        raise UserError(f"--secret={absent[0]}: no such variable in the environment")
    return plan.submit()


def task(name: str, job: LaunchJob, options: argparse.Namespace) -> dict[str, Any]:
    """SkyPilot's YAML of a job named `name`, as plain data."""
    chosen = _slice(options, job.config)
    if chosen and options.nodes > 1:
        raise UserError(
            f"--nodes is {options.nodes}; a TPU slice is one node of SkyPilot's"
        )
    platform = "tpu" if chosen else "cuda13"
    many = options.nodes * (chosen.hosts if chosen else 1) > 1
    arguments = job.command("python", distributed=many)[1:]
    resources = {
        "accelerators": f"tpu-{chosen.type}" if chosen else options.accelerators,
        "use_spot": options.spot,
        "job_recovery": {
            "max_restarts_on_errors": options.restarts,
            "recover_on_exit_codes": [PREEMPTED],
        },
    }
    return {
        "name": name,
        "workdir": str(remote_jobs.ROOT),
        "num_nodes": options.nodes,
        "resources": ({"infra": options.infra} if options.infra else {}) | resources,
        "file_mounts": {MOUNT: {"source": options.bucket, "mode": "MOUNT"}},
        "envs": {
            provenance.CODE_VERSION: provenance.code_version(remote_jobs.ROOT),
            **job.env,
        },
        **({"secrets": dict.fromkeys(options.secret)} if options.secret else {}),
        "setup": f"bash launch/setup/install.sh {ENVIRONMENT} 'jax[{platform}]'\n",
        "run": f"exec {ENVIRONMENT}/bin/python {shlex.join(arguments)}\n",
    }


def _slice(options: argparse.Namespace, config: Config) -> tpu_slices.TpuSlice | None:
    """The TPU slice of a job; None if GPUs are named."""
    given, flag = options.accelerators, "--accelerators=tpu-TYPE"
    if given and not given.startswith("tpu-"):
        return None
    type_ = given.removeprefix("tpu-")
    return tpu_slices.only(config, type_, flag, "--accelerators=H100:8")


class _Dumper(yaml.SafeDumper):
    """Writes scripts as YAML blocks where it can."""


def _script(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _script)
