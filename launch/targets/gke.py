"""A JobSet on GKE, created by `kubectl`; Kueue may queue it.

An error that a person must fix ends the JobSet. A preemption restarts it and never
counts as a failure. Any other failure restarts it, `--restarts` times. The Job of a
single pod replaces that pod. Several pods restart together, because a new pod cannot
join the others' old coordinator.

Sources:
  jobset  https://jobset.sigs.k8s.io/docs: DNS names of pods are JOBSET-JOB-REPLICA-
          INDEX.JOBSET; `exclusive-topology` gives each slice a node pool of its own;
          a JobSet rule sees why a Job failed (`PodFailurePolicy`) and, since JobSet
          0.10, its message, which ends with the index of the pod rule that was met.
  job     https://kubernetes.io/docs/concepts/workloads/controllers/job: rules of a
          `podFailurePolicy` count from the first; it needs `restartPolicy: Never`, and
          makes the replacement wait until the pod has ended.
  kueue   https://kueue.sigs.k8s.io/docs/tasks/run/jobsets: it reads the label, and sets
          and clears `suspend` by itself, so this manifest does not set that field.
  jax     jax/_src/clusters/cloud_tpu_cluster.py: on TPUs JAX reads TPU_WORKER_ID,
          TPU_WORKER_HOSTNAMES and, of several slices, MEGASCALE_*; GKE sets them in
          the pods of a JobSet that ask for google.com/tpu.
  xpk     github.com/AI-Hypercomputer/xpk: its label, and the name `slice-job`, make
          `xpk workload list` and its dashboards see the job.
"""

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from launch.clouds import remote_jobs, tpu_slices
from launch.jobs import restart_policy
from launch.jobs.launch_flags import (
    add_grace,
    add_number,
    add_restarts,
    add_text,
    add_texts,
)
from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config
from research.core.errors import PREEMPTED, UserError
from research.core.text_templates import fill
from research.parallel.chips import find_chip
from research.runs import provenance

HELP = "a JobSet on a GKE cluster, TPU slices or GPU nodes; --image holds this code"
TOOLS: Mapping[str, str] = {
    "kubectl": "gcloud components install kubectl, then gcloud container clusters "
    "get-credentials CLUSTER"
}
TEMPLATE = Path(__file__).parent / "templates/jobset.yaml.jinja"
PORT = 8482  # of the first process of GPU nodes, for the others
TASK = "slice-job"
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_text(parser, "--image", "its working directory holds this code; required")
    add_text(parser, "--queue", "Kueue's local queue")
    add_text(parser, "--namespace", "default: default", default="default")
    add_text(parser, "--topology", "v5e:4x4; default: config.runtime.topology")
    add_number(parser, "--slices", "default: config.runtime.slices", 0, least=0)
    add_number(parser, "--gpus-per-node", "use GPU nodes, not TPUs", 0, least=0)
    add_number(parser, "--nodes", "GPU nodes; default: 1", 1, least=1)
    add_text(parser, "--gpu", "node selector gke-accelerator: nvidia-h100-80gb")
    add_grace(parser)
    add_restarts(parser)
    add_texts(
        parser,
        "--volume",
        "CLAIM:/PATH",
        "persistent volume claim; the first one holds run directories; required",
    )
    remote_jobs.add_secret_flag(
        parser, "Secret of the namespace; its keys become environment variables"
    )


def rents(options: argparse.Namespace) -> bool:
    return True


def chips(options: argparse.Namespace, config: Config) -> tuple[str, int] | None:
    """The chips of the nodes; None for GPUs that are not named or not known."""
    if not options.gpus_per_node:
        return _slice(options, config).name, _slices(options, config)
    # GKE names the A100 of 40 GB without its memory.
    label = {"nvidia-tesla-a100": "a100-40"}.get(options.gpu, options.gpu)
    chip = find_chip(label)
    count = options.nodes * options.gpus_per_node
    return (f"{chip.name}:{count}", 1) if chip else None


def plan(jobs: Sequence[LaunchJob], options: argparse.Namespace) -> LaunchPlan:
    """Plans a manifest for each job."""
    if not options.image:
        raise UserError("no image: give --image=REGISTRY/NAME:TAG, which has this code")
    remote_jobs.check_secrets(options.secret, DNS_NAME)
    volumes = _volumes(options.volume)
    files, commands = {}, []
    for name, job in zip(remote_jobs.names(jobs), jobs, strict=True):
        there = remote_jobs.stored(remote_jobs.portable(job, "gke"), volumes[0][1])
        file = job.file(".jobset.yaml")
        files[file] = manifest(name, there, options, volumes)
        # `kubectl apply` would exit with 0 and not restart a JobSet that has ended.
        commands.append(["kubectl", "create", f"--filename={file}"])
    return LaunchPlan(files, commands)


def run(plan: LaunchPlan, options: argparse.Namespace) -> int:
    """Submits all, even if one is refused; returns the first exit code above 0."""
    if code := plan.submit():
        sys.stderr.write(
            "a JobSet was refused; if one of that name has ended, run kubectl delete "
            "jobset NAME and the same command again\n"
        )
        return code
    where = f"--namespace={options.namespace}"
    sys.stderr.write(
        f"kubectl get jobsets {where} shows them; kubectl logs {where} --follow "
        "--selector=jobset.sigs.k8s.io/jobset-name=NAME follows one\n"
    )
    return 0


def _volumes(given: Sequence[str]) -> list[tuple[str, str]]:
    """The claims and their mount paths."""
    if not given:
        raise UserError(
            "no volume: a pod's disk is deleted with it; give --volume=CLAIM:/PATH for "
            "the run directory"
        )
    volumes = []
    for text in given:
        claim, _, path = text.partition(":")
        if not DNS_NAME.fullmatch(claim) or not re.fullmatch(r"/[^:]+", path):
            raise UserError(f"--volume is {text!r}; write it as CLAIM:/PATH")
        volumes.append((claim, path))
    return volumes


def manifest(
    name: str,
    job: LaunchJob,
    options: argparse.Namespace,
    volumes: Sequence[tuple[str, str]],
) -> str:
    """The YAML of the JobSet named `name`."""
    if options.gpus_per_node:
        if options.slices > 1:
            raise UserError("--slices is for TPUs; with --gpus-per-node give --nodes")
        chosen, hosts, slices = None, options.nodes, 1
    else:
        chosen, slices = _slice(options, job.config), _slices(options, job.config)
        hosts = chosen.hosts
        if hosts == 1 and slices > 1:
            raise UserError(
                f"--slices is {slices}, and {chosen.name} has one host: GKE joins "
                "slices of several hosts only"
            )
    several = hosts * slices > 1
    # The image names the code version; there is no git in the pod.
    variables = {provenance.CODE_VERSION: f"image {options.image}", **job.env}
    return fill(
        TEMPLATE,
        _quoted,
        name=name,
        task=TASK,
        options=options,
        volumes=volumes,
        slice=chosen,
        hosts=hosts,
        slices=slices,
        several=several,
        final=sorted(restart_policy.FINAL - {0}),
        preempted=PREEMPTED,
        after_preemption="FailJob" if several else "Ignore",
        command=[_unexpanded(x) for x in job.command("python", distributed=several)],
        variables={k: _unexpanded(v) for k, v in variables.items()},
        coordinator=f"{name}-{TASK}-0-0.{name}:{PORT}",
    )


def _quoted(value: str | int) -> str:
    """A value on one line of YAML, which nothing in it can end."""
    style = None if str(value).isprintable() else '"'
    text = yaml.safe_dump(
        value, default_style=style, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _slice(options: argparse.Namespace, config: Config) -> tpu_slices.TpuSlice:
    topology = options.topology or config.runtime.topology
    return tpu_slices.named(topology, "--topology=v5e:4x4")


def _slices(options: argparse.Namespace, config: Config) -> int:
    return options.slices or config.runtime.slices


def _unexpanded(word: str) -> str:
    """Kubernetes replaces `$(NAME)` in a command by a variable, and `$$` by `$`."""
    return word.replace("$", "$$")
