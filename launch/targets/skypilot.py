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
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from launch.clouds import remote_jobs, tpu_slices
from launch.jobs.launch_flags import add_restarts, at_least
from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config
from research.core.errors import PREEMPTED, UserError
from research.parallel.chips import CHIPS
from research.runs import provenance

HELP = "a managed job of SkyPilot, on TPUs or GPUs of any cloud it knows"
TOOLS: Mapping[str, str] = {"sky": 'pip install "skypilot[gcp]", then sky check'}
MOUNT = "/mnt/research"
# SkyPilot mounts gs:// with gcsfuse, which can rename folders as checkpoints need.
BUCKET = re.compile(r"gs://[a-z0-9][-a-z0-9_.]*[a-z0-9]")
ENVIRONMENT = '"$HOME/research-env"'

RUN = """exec {environment}/bin/python {arguments}
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accelerators",
        default="",
        help="H100:8 or tpu-v5litepod-16; default: from config.runtime.topology",
    )
    parser.add_argument(
        "--nodes", type=at_least(1), default=1, help="GPU nodes; default: 1"
    )
    parser.add_argument("--infra", default="", help="gcp/us-west4; default: any")
    parser.add_argument(
        "--spot", action="store_true", help="use machines that may be preempted"
    )
    parser.add_argument(
        "--bucket", default="", help="gs://NAME for run directories; required"
    )
    # SkyPilot would also restart a run that a person must fix.
    add_restarts(parser, default=0)
    remote_jobs.add_secret_flag(
        parser, "environment variable of this shell to pass to the job"
    )


def rents(options: argparse.Namespace) -> bool:
    return True


def chips(options: argparse.Namespace, config: Config) -> tuple[str, int] | None:
    """The chips of the nodes; None for GPUs that are not known."""
    given, _, count = options.accelerators.partition(":")
    if given and not given.startswith("tpu-"):
        known = given.lower() in CHIPS and (count or "1").isdigit()
        number = int(count or 1) * options.nodes if known else 0
        return (f"{given.lower()}:{number}", 1) if known else None
    chosen = _slice(given, config)
    return f"{chosen.chip.name}:{chosen.shape}", 1


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
    plan.write_files()
    codes = [subprocess.run(x, check=False).returncode for x in plan.commands]
    return next((code for code in codes if code), 0)


def task(name: str, job: LaunchJob, options: argparse.Namespace) -> dict[str, Any]:
    """SkyPilot's YAML of a job named `name`, as plain data."""
    accelerators, hosts = _accelerators(job, options)
    platform = "tpu" if accelerators.startswith("tpu-") else "cuda13"
    many = options.nodes * hosts > 1
    arguments = job.command("python", distributed=many)[1:]
    resources = {
        "accelerators": accelerators,
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
        "run": RUN.format(
            environment=ENVIRONMENT,
            arguments=shlex.join(arguments),
        ),
    }


def _accelerators(job: LaunchJob, options: argparse.Namespace) -> tuple[str, int]:
    """SkyPilot's name of the accelerators, and the number of hosts in one node.

    Raises:
      UserError: there is no such TPU, or several TPU nodes were requested.
    """
    given = options.accelerators
    if given and not given.startswith("tpu-"):
        return given, 1
    chosen = _slice(given, job.config)
    if options.nodes > 1:
        raise UserError(
            f"--nodes is {options.nodes}; a TPU slice is one node of SkyPilot's"
        )
    name = tpu_slices.default_type(chosen, "--config.runtime.topology")
    return f"tpu-{name}", chosen.hosts


def _slice(given: str, config: Config) -> tpu_slices.TpuSlice:
    type_, flag = given.removeprefix("tpu-"), "--accelerators=tpu-TYPE"
    return tpu_slices.only(config, type_, flag, "--accelerators=H100:8")


class _Dumper(yaml.SafeDumper):
    """Writes scripts as YAML blocks where it can."""


def _script(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _script)
