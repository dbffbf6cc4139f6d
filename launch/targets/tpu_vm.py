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
import dataclasses
import logging
import os
import shlex
from collections.abc import Mapping, Sequence

from launch.clouds import remote_jobs, rented_machines, tpu_slices
from launch.jobs.launch_flags import add_restarts
from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config
from research.core.errors import PREEMPTED, UserError
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

TEMPLATE = """#!/bin/bash
# bash research.sh install|train|go|tail|stop, on each worker of a TPU VM.
set -u
cd "$HOME" || exit 2
command=({command})
finish() {{ echo "$1" >"$HOME/research.code"; exit "$1"; }}
lives() {{ [ -e research.pid ] && kill -0 "$(cat research.pid)" 2>/dev/null; }}

install_it() {{
  set -e
  rm -rf research
  mkdir research
  tar -xzf research.tar.gz -C research
  sudo install -d -o "$(id -un)" {folder}
{mount}  bash research/launch/setup/install.sh "$HOME/research-env" 'jax[tpu]'
}}

case "$1" in
install) if ! lives; then install_it; fi ;;
train)  # Starts one trainer, even if it is called again.
  lives && exit 0
  rm -f research.code research.stopped
  setsid bash "$0" go >>research.log 2>&1 </dev/null &
  echo $! >research.pid
  ;;
go)
  export {version_name}={version}
{secrets}  cd research || finish 2
  "${{command[@]}}" &
  trainer=$!
  trap 'kill -TERM "$trainer"' TERM
  wait "$trainer"; code=$?
  # The trap ends the first wait while the trainer is still saving.
  while kill -0 "$trainer" 2>/dev/null; do wait "$trainer"; code=$?; done
  # A run that a person stopped must not restart.
  if [ "$code" -eq {preempted} ] && [ -e ../research.stopped ]; then code=130; fi
  finish "$code"
  ;;
tail)
  tail -n 100 -s 0.2 --pid="$(cat research.pid)" -F research.log
  exit "$(cat research.code 2>/dev/null || echo 137)"
  ;;
stop)
  touch research.stopped
  kill -TERM "$(cat research.pid)"
  ;;
esac
"""

# Several hosts share the run directory, so no metadata is cached. Checkpoints are
# committed by a rename, so folders can be renamed.
MOUNT_TEMPLATE = """\
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    list="https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee $key >/dev/null
    echo "deb [signed-by=$key] $list" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  mountpoint -q {folder} || gcsfuse --implicit-dirs --rename-dir-limit=100000 \\
    --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 {bucket} {folder}
"""
SECRET_TEMPLATE = """\
  {name}=$(gcloud secrets versions access latest --secret={name}{project}) || finish 2
  export {name}
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--zone", default="", help="zone, such as us-west4-a; required")
    parser.add_argument("--project", default="", help="default: gcloud's")
    parser.add_argument(
        "--type", default="", help="v5litepod-16; default: from config.runtime.topology"
    )
    parser.add_argument("--runtime-version", default="", help="default: JAX's own")
    parser.add_argument(
        "--spot", action="store_true", help="use a VM that may be preempted"
    )
    parser.add_argument(
        "--queued", action="store_true", help="wait in the queue for free chips"
    )
    parser.add_argument(
        "--bucket", default="", help="mounted on all hosts; holds run directories"
    )
    parser.add_argument(
        "--create", action="append", default=[], metavar="FLAG",
        help="another flag for gcloud create, as --create=--network=NAME; repeatable",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="do not delete the VM")
    add_restarts(parser)
    parser.add_argument(
        "--do", choices=STEPS, default="run", help="one part of a launch; default: run"
    )
    remote_jobs.add_secret_flag(
        parser, "secret of Secret Manager; the VM reads it into a variable of its name"
    )


def chips(options: argparse.Namespace, config: Config) -> tuple[str, int]:
    """The chips of the slice."""
    chosen = _slice(config, options)
    return f"{chosen.chip.name}:{chosen.shape}", 1


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
            f"{chosen.hosts} host(s) of {chosen.type} keep {job.config.run_dir} on "
            "their own disks, which are deleted with the VM: give --bucket=NAME"
        )
    job = remote_jobs.stored(job, FOLDER)
    arguments = job.command("python", distributed=chosen.hosts > 1)[1:]
    variables = f"{shlex.join(job.setting_env([]))} " if job.env else ""
    project = f" --project={shlex.quote(options.project)}" if options.project else ""
    bucket = shlex.quote(options.bucket.removeprefix("gs://"))
    mount = MOUNT_TEMPLATE.format(bucket=bucket, folder=FOLDER)
    return TEMPLATE.format(
        command=f'{variables}"$HOME/research-env/bin/python" {shlex.join(arguments)}',
        folder=FOLDER,
        mount=mount if options.bucket else "",
        version_name=provenance.CODE_VERSION,
        version=version,
        preempted=PREEMPTED,
        secrets="".join(
            SECRET_TEMPLATE.format(name=name, project=project)
            for name in options.secret
        ),
    )


def _slice(config: Config, options: argparse.Namespace) -> tpu_slices.TpuSlice:
    return tpu_slices.only(config, options.type, "--type", "--type=v5litepod-16")


@dataclasses.dataclass(frozen=True)
class _Gcloud:
    """Makes commands of `gcloud compute tpus GROUP VERB`."""

    where: Sequence[str]

    def __call__(self, group: str, verb: str, *arguments: str) -> list[str]:
        own = ["gcloud", "--quiet", "compute", "tpus", group, verb]
        return [*own, *arguments, *self.where]


def _commands(
    name: str,
    chosen: tpu_slices.TpuSlice,
    sent: Sequence[str],
    options: argparse.Namespace,
) -> dict[str, list[list[str]]]:
    """The commands of each step."""
    project = [f"--project={options.project}"] if options.project else []
    gcloud = _Gcloud([f"--zone={options.zone}", *project])
    type_ = tpu_slices.default_type(chosen, "--config.runtime.topology")
    software = options.runtime_version or chosen.generation.runtime
    wanted = [
        f"--accelerator-type={type_}",
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
