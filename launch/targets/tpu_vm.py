"""A TPU VM for each job: gcloud creates it, and deletes it when the run is done.

The trainer does not depend on the connection that started it. This launcher follows
its log, and can be stopped and started again (`--do=tail`). A preempted VM is created
again, and the run resumes from its last checkpoint.

Sources: `gcloud compute tpus tpu-vm create|ssh|scp --help` and `gcloud compute tpus
queued-resources create --help` (SDK 528); https://cloud.google.com/tpu/docs/spot (a
spot VM cannot be started again) and /queued-resources (their states);
https://cloud.google.com/storage/docs/cloud-storage-fuse/cli-options and /install.
JAX finds the hosts of a slice by itself, from the metadata server
(jax/_src/clusters/cloud_tpu_cluster.py).
"""

import argparse
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.clouds import remote_jobs, rented_machines, tpu_slices
from launch.jobs.launch_flags import add_restarts, add_switch, add_text, add_texts
from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config
from research.core.errors import PREEMPTED, UserError
from research.core.text_templates import fill
from research.core.visible_text import counted
from research.runs import provenance

HELP = "a TPU VM for each job on Google Cloud, which runs the last commit"
TOOLS: Mapping[str, str] = {
    "gcloud": "install the Google Cloud CLI, then gcloud auth login",
    "git": "install git",
}
STEPS = {
    "run": ["create", "state", "push", "install", "train", "tail", "delete"],
    "create": ["create", "state"],
    "push": ["push", "install"],
    "train": ["train"],
    "tail": ["tail"],
    "stop": ["stop"],
    "delete": ["delete"],
}
FOLDER = "/mnt/research"  # holds run directories; a new push does not touch it

TEMPLATE = Path(__file__).parent / "templates/tpu_vm.sh.jinja"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_text(parser, "--zone", "zone, such as us-west4-a; required")
    add_text(parser, "--project", "default: gcloud's")
    add_text(parser, "--type", "v5litepod-16; default: from config.runtime.topology")
    add_text(parser, "--runtime-version", "default: JAX's own")
    add_switch(parser, "--spot", "use a VM that may be preempted")
    add_switch(parser, "--queued", "wait in the queue for free chips")
    add_text(parser, "--bucket", "mounted on all hosts; holds run directories")
    add_texts(
        parser,
        "--create",
        "FLAG",
        "another flag for gcloud create, as --create=--network=NAME; repeatable",
    )
    add_switch(parser, "--keep", "do not delete the VM")
    add_restarts(parser)
    parser.add_argument(
        "--do", choices=STEPS, default="run", help="one part of a launch; default: run"
    )
    remote_jobs.add_secret_flag(
        parser, "secret of Secret Manager; the VM reads it into a variable of its name"
    )


def chips(options: argparse.Namespace, config: Config) -> tuple[str, int]:
    """The chips of the slice."""
    return _slice(config, options).name, 1


def rents(options: argparse.Namespace) -> bool:
    """Whether this command creates a VM; only then must the config fit."""
    return "create" in STEPS[options.do]


def plan(jobs: Sequence[LaunchJob], options: argparse.Namespace) -> LaunchPlan:
    """Plans a VM for each job."""
    if not options.zone:
        raise UserError("no zone: give --zone=us-west4-a, or where you have TPUs")
    remote_jobs.check_secrets(options.secret)
    steps = [step for step in STEPS[options.do] if step != "delete" or not options.keep]
    if options.do == "delete":
        steps = ["delete"]
    jobs = [remote_jobs.portable(job, "tpu-vm") for job in jobs]
    chosen = [_slice(job.config, options) for job in jobs]
    files, made = {}, []
    version = remote_jobs.committed(jobs, "tpu-vm") if "push" in steps else ""
    # Named by the commit: a VM that is created again gets the code of its launch.
    archive = os.path.abspath(jobs[0].beside.with_name(f"research-{version}.tar.gz"))
    for name, job, each in zip(remote_jobs.names(jobs), jobs, chosen, strict=True):
        script = job.file(".tpu-vm.sh")
        if "push" in steps:
            files[script] = worker_script(job, each, version, options)
        known = _commands(name, each, [archive, os.path.abspath(script)], options)
        commands = {step: known[step] for step in steps}
        log = job.file(".tpu-vm.log") if len(jobs) > 1 else None
        made.append(rented_machines.RentedMachine(name, commands, log))
    send = ["git", "-C", str(remote_jobs.ROOT), "archive", "--format=tar.gz"]
    before = [[*send, f"--output={archive}", version]] if "push" in steps else []
    flat = [command for m in made for step in m.steps.values() for command in step]
    return rented_machines.MachinesPlan(
        files, [*before, *flat], before=before, machines=made
    )


def run(plan: LaunchPlan, options: argparse.Namespace) -> int:
    """Runs until all is done; after a signal to this launcher the VMs keep running."""
    logging.basicConfig(level=logging.INFO, format="launch: %(message)s")
    plan.write_files()
    return rented_machines.run(plan, options.restarts, whole=options.do == "run")


def worker_script(
    job: LaunchJob,
    chosen: tpu_slices.TpuSlice,
    version: str,
    options: argparse.Namespace,
) -> str:
    """The script that runs on each host of the VM.

    Raises:
      UserError: the run would be lost with the VM, or its hosts would not share it.
    """
    lost = chosen.hosts > 1 or (options.do == "run" and not options.keep)
    if lost and not options.bucket:
        raise UserError(
            f"{job.config.run_dir} would be on the own disks of "
            f"{counted(chosen.hosts, 'host')} of {chosen.type}, which are deleted with "
            "the VM: give --bucket=NAME"
        )
    job = remote_jobs.stored(job, FOLDER)
    arguments = job.command("python", distributed=chosen.hosts > 1)[1:]
    variables = f"{shlex.join(job.setting_env([]))} " if job.env else ""
    return fill(
        TEMPLATE,
        command=f'{variables}"$HOME/research-env/bin/python" {shlex.join(arguments)}',
        folder=FOLDER,
        bucket=options.bucket and shlex.quote(options.bucket.removeprefix("gs://")),
        version_name=provenance.CODE_VERSION,
        version=version,
        preempted=PREEMPTED,
        secrets=options.secret,
        project=options.project and shlex.quote(options.project),
    )


def _slice(config: Config, options: argparse.Namespace) -> tpu_slices.TpuSlice:
    return tpu_slices.only(config, options.type, "--type", "--type=v5litepod-16")


def _commands(
    name: str,
    chosen: tpu_slices.TpuSlice,
    sent: Sequence[str],
    options: argparse.Namespace,
) -> dict[str, list[list[str]]]:
    """The commands of each step."""
    where = [f"--zone={options.zone}"]
    where += [f"--project={options.project}"] * bool(options.project)

    def gcloud(group: str, verb: str, *arguments: str) -> list[str]:
        own = ["gcloud", "--quiet", "compute", "tpus", group, verb]
        return [*own, *arguments, *where]

    software = options.runtime_version or chosen.generation.runtime
    wanted = [
        f"--accelerator-type={chosen.type}",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        *(["--spot"] if options.spot else []),
        *options.create,
    ]
    if options.queued:
        group, state = "queued-resources", "state.state"
        wanted += [f"--node-id={name}", f"--runtime-version={software}"]
    else:
        group, state = "tpu-vm", "state"
        wanted += [f"--version={software}"]
    force = ["--force"] if options.queued else []

    def everywhere(action: str) -> list[list[str]]:
        command = f"--command=bash research.sh {action}"
        return [gcloud("tpu-vm", "ssh", name, "--worker=all", command)]

    return {
        "create": [gcloud(group, "create", name, *wanted)],
        "state": [gcloud(group, "describe", name, f"--format=value({state})")],
        "push": [
            gcloud("tpu-vm", "scp", file, f"{name}:research.{end}", "--worker=all")
            for file, end in zip(sent, ("tar.gz", "sh"), strict=True)
        ],
        **{x: everywhere(x) for x in ("install", "train", "tail", "stop")},
        "delete": [gcloud(group, "delete", name, *force)],
    }
