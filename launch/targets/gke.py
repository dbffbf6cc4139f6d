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
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from launch.clouds import remote_jobs, tpu_slices
from launch.jobs import restart_policy
from launch.jobs.launch_flags import add_grace, add_restarts, at_least
from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config
from research.core.errors import PREEMPTED, UserError
from research.parallel.chips import CHIPS
from research.runs import provenance

HELP = "a JobSet on a GKE cluster, TPU slices or GPU nodes; --image holds this code"
TOOLS: Mapping[str, str] = {
    "kubectl": "gcloud components install kubectl, then gcloud container clusters "
    "get-credentials CLUSTER"
}
PORT = 8482  # of the first process of GPU nodes, for the others
TASK = "slice-job"
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
Manifest = dict[str, Any]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", default="", help="its working directory holds this code; required"
    )
    parser.add_argument("--queue", default="", help="Kueue's local queue")
    parser.add_argument("--namespace", default="default", help="default: default")
    parser.add_argument(
        "--topology", default="", help="v5e:4x4; default: config.runtime.topology"
    )
    parser.add_argument(
        "--slices", type=at_least(0), default=0, help="default: config.runtime.slices"
    )
    parser.add_argument(
        "--gpus-per-node", type=at_least(0), default=0, help="use GPU nodes, not TPUs"
    )
    parser.add_argument(
        "--nodes", type=at_least(1), default=1, help="GPU nodes; default: 1"
    )
    parser.add_argument(
        "--gpu", default="", help="node selector gke-accelerator: nvidia-h100-80gb"
    )
    add_grace(parser)
    add_restarts(parser)
    parser.add_argument(
        "--volume", action="append", default=[], metavar="CLAIM:/PATH",
        help="persistent volume claim; the first one holds run directories; required",
    )  # fmt: skip
    remote_jobs.add_secret_flag(
        parser, "Secret of the namespace; its keys become environment variables"
    )


def rents(options: argparse.Namespace) -> bool:
    return True


def chips(options: argparse.Namespace, config: Config) -> tuple[str, int] | None:
    """The chips of the nodes; None for GPUs that are not named or not known."""
    if not options.gpus_per_node:
        topology = options.topology or config.runtime.topology
        chosen = tpu_slices.named(topology, "--topology=v5e:4x4")
        return f"{chosen.chip.name}:{chosen.shape}", _slices(options, config)
    words = options.gpu.split("-")
    known = [c.name for c in CHIPS.values() if c.platform == "gpu" and c.name in words]
    return (f"{known[0]}:{options.nodes * options.gpus_per_node}", 1) if known else None


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
        files[file] = yaml.safe_dump(
            manifest(name, there, options, volumes), sort_keys=False, allow_unicode=True
        )
        # `kubectl apply` would exit with 0 and not restart a JobSet that has ended.
        commands.append(["kubectl", "create", f"--filename={file}"])
    return LaunchPlan(files, commands)


def run(plan: LaunchPlan, options: argparse.Namespace) -> int:
    """Submits all, even if one is refused; returns the first exit code above 0."""
    plan.write_files()
    codes = [subprocess.run(x, check=False).returncode for x in plan.commands]
    if any(codes):
        sys.stderr.write(
            f"{sum(map(bool, codes))} of {len(codes)} were refused; if a JobSet of "
            "that name has ended, run kubectl delete jobset NAME and the same command "
            "again\n"
        )
        return next(code for code in codes if code)
    where = f"--namespace={options.namespace}"
    sys.stderr.write(
        f"kubectl get jobsets {where} shows them; kubectl logs {where} --follow "
        "--selector=jobset.sigs.k8s.io/jobset-name=NAME follows one\n"
    )
    return 0


def _volumes(given: Sequence[str]) -> list[tuple[str, str]]:
    """The claims and their mount paths.

    Raises:
      UserError: there is no volume, or one is not `CLAIM:/PATH`.
    """
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
) -> Manifest:
    """The JobSet named `name`, as plain data."""
    labels = {"xpk.google.com/workload": name}
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    where = _gpus(name, options) if options.gpus_per_node else _tpus(job, options)
    hosts, count = where["hosts"], where["slices"]
    several = hosts * count > 1
    container = _container(job, options, volumes, where, several)
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "nodeSelector": where["nodes"],
        "containers": [container],
        "volumes": [
            {"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": claim}}
            for index, (claim, _) in enumerate(volumes)
        ],
    }
    task = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_rules(several)},
        "template": {
            "metadata": {"labels": labels},
            "spec": _without_empty(where["network"] | pod),
        },
    }
    replicas = {"name": TASK, "replicas": count, "template": {"spec": task}}
    metadata = {
        "name": name,
        "namespace": options.namespace,
        "labels": queue | labels,
        "annotations": where["annotations"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _without_empty(metadata),
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": _set_rules(several),
            },
            "replicatedJobs": [replicas],
        },
    }


def _container(
    job: LaunchJob,
    options: argparse.Namespace,
    volumes: Sequence[tuple[str, str]],
    where: Manifest,
    several: bool,
) -> Manifest:
    command = job.command("python", distributed=several)
    container = {
        "name": "trainer",
        "image": options.image,
        "command": [_unexpanded(word) for word in command],
        # The image names the code version; there is no git in the pod.
        "env": [
            *_variables({provenance.CODE_VERSION: f"image {options.image}"}),
            *_variables(job.env),
            *where["env"],
        ],
        "envFrom": [{"secretRef": {"name": secret}} for secret in options.secret],
        "resources": {"limits": where["limits"]},
        "volumeMounts": [
            {"name": f"volume-{index}", "mountPath": path}
            for index, (_, path) in enumerate(volumes)
        ],
    }
    return _without_empty(container)


def _pod_rules(several: bool) -> list[Manifest]:
    """Rules for a pod that ends; the first one that matches counts."""
    preempted = "FailJob" if several else "Ignore"
    return [
        # Exit codes come first: a disrupted pod may also have failed to save.
        {
            "action": "FailJob",
            "onExitCodes": {
                "operator": "In",
                "values": sorted(restart_policy.FINAL - {0}),
            },
        },
        {"action": preempted, "onExitCodes": {"operator": "In", "values": [PREEMPTED]}},
        {
            "action": preempted,
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
    ]


def _set_rules(several: bool) -> list[Manifest]:
    """Rules for the JobSet after a pod rule has failed one of its Jobs."""
    met: Manifest = {"onJobFailureReasons": ["PodFailurePolicy"]}
    final = {"name": "final", "action": "FailJobSet"} | met
    if not several:
        return [final]
    first = {"onJobFailureMessagePatterns": ["matching FailJob rule at index 0$"]}
    again = "RestartJobSetAndIgnoreMaxRestarts"
    return [final | first, {"name": "preempted", "action": again} | met]


def _tpus(job: LaunchJob, options: argparse.Namespace) -> Manifest:
    """The parts of a JobSet that depend on the hardware, for TPUs."""
    topology = options.topology or job.config.runtime.topology
    chosen = tpu_slices.named(topology, "--topology=v5e:4x4")
    count = _slices(options, job.config)
    if chosen.hosts == 1 and count > 1:
        raise UserError(
            f"--slices is {count}, and {topology} has one host: GKE joins "
            "slices of several hosts only"
        )
    # The hosts' own network interfaces are faster between slices.
    direct = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    pool = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    return {
        "hosts": chosen.hosts,
        "slices": count,
        "env": [],
        "limits": {"google.com/tpu": chosen.chips // chosen.hosts},
        "nodes": {
            "cloud.google.com/gke-tpu-accelerator": chosen.generation.gke,
            "cloud.google.com/gke-tpu-topology": chosen.shape,
        },
        "network": direct if count > 1 else {},
        "annotations": pool if chosen.hosts > 1 else {},
    }


def _slices(options: argparse.Namespace, config: Config) -> int:
    return options.slices or config.runtime.slices


def _gpus(name: str, options: argparse.Namespace) -> Manifest:
    """The same parts for GPUs; JAX needs variables there to find the other hosts."""
    if options.slices > 1:
        raise UserError("--slices is for TPUs; with --gpus-per-node give --nodes")
    first = f"{name}-{TASK}-0-0.{name}:{PORT}"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    env = [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
        {"name": "JAX_NUM_PROCESSES", "value": str(options.nodes)},
        {
            "name": "JAX_PROCESS_ID",
            "valueFrom": {"fieldRef": {"fieldPath": index}},
        },
    ]
    kind = {"cloud.google.com/gke-accelerator": options.gpu} if options.gpu else {}
    return {
        "hosts": options.nodes,
        "slices": 1,
        "env": env if options.nodes > 1 else [],
        "limits": {"nvidia.com/gpu": options.gpus_per_node},
        "nodes": kind,
        "network": {},
        "annotations": {},
    }


def _variables(values: Mapping[str, str]) -> list[Manifest]:
    return [{"name": k, "value": _unexpanded(v)} for k, v in values.items()]


def _unexpanded(word: str) -> str:
    """Kubernetes replaces `$(NAME)` in a command by a variable, and `$$` by `$`."""
    return word.replace("$", "$$")


def _without_empty(fields: Manifest) -> Manifest:
    return {name: value for name, value in fields.items() if value not in ({}, [])}
