"""Where the processes of a run find each other, and which devices each one takes.

Four sources count, in this order: flags, the JAX_* variables, SkyPilot's variables, and
JAX's own detection (`jax.distributed.initialize`), which knows Slurm, TPUs on GKE and
Compute Engine, Kubernetes and Open MPI.

Meaning of the variables:
  JAX       https://docs.jax.dev/en/latest/jax.distributed.html
  SkyPilot  https://docs.skypilot.co/en/latest/running-jobs/environment-variables.html
  Slurm     https://slurm.schedmd.com/srun.html, output environment variables
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence

# JAX has no public function that returns what it detects, or what it has joined.
from jax._src import clusters, distributed

from research.core.errors import UserError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
NAMES = {
    "SlurmCluster": "Slurm",
    "GkeTpuCluster": "GKE TPU",
    "GceTpuCluster": "Cloud TPU",
    "K8sCluster": "Kubernetes",
    "OmpiCluster": "Open MPI",
}
# JAX takes the port of a Slurm job from this range, so two jobs seldom share one.
FIRST_PORT, PORTS = 61440, 4096


@dataclasses.dataclass(frozen=True)
class Processes:
    """All processes of a run, as one of them sees it.

    Attributes:
      address: `host:port` of the coordinator, which process 0 starts.
      count: number of processes.
      index: number of this process, from 0.
      source: where this is known from, for messages.
    """

    address: str
    count: int
    index: int
    source: str

    def __str__(self) -> str:
        return (
            f"{self.count} by {self.source}, this one is number {self.index}, "
            f"coordinator {self.address}"
        )


def resolve(
    environment: Mapping[str, str], flags: Mapping[str, str]
) -> Processes | None:
    """The processes that flags or the environment name; None leaves it to JAX.

    On a TPU slice the ranks of SkyPilot are not used, because libtpu numbers the hosts
    and JAX follows libtpu.

    Args:
      environment: variables of this process.
      flags: address, count and index by the names of their flags; "" where not given.

    Raises:
      UserError: the flags or variables are incomplete or contradict each other.
    """
    variables = {name: environment.get(name, "") for name in EXPLICIT}
    for given, source in ((flags, "flags"), (variables, "JAX_* variables")):
        if any(given.values()):
            return _explicit(given, source)
    if environment.get("SKYPILOT_NODE_IPS") and not _on_tpu():
        return _skypilot(environment)
    return None


def _explicit(given: Mapping[str, str], source: str) -> Processes:
    missing = [name for name, value in given.items() if not value]
    if missing:
        there = [name for name, value in given.items() if value]
        raise UserError(
            f"{' and '.join(there)} {_is(there)} set, {' and '.join(missing)} "
            f"{_is(missing)} not: set all three, or none where JAX knows the cluster"
        )
    (where, address), (_, count), (_, index) = given.items()
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"{where} is {address!r}; it must be HOST:PORT")
    _, *names = given
    return _checked(address, count, index, names, source)


def _skypilot(environment: Mapping[str, str]) -> Processes:
    """SkyPilot starts one process per node, which takes all devices of the node."""
    names = ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK")
    hosts = environment["SKYPILOT_NODE_IPS"].split()
    # Older releases do not set the number: https://docs.skypilot.co/en/v0.5.0
    count = environment.get(names[0]) or str(len(hosts))
    if count != str(len(hosts)):
        raise UserError(
            f"SKYPILOT_NUM_NODES is {count!r}, and SKYPILOT_NODE_IPS has {len(hosts)} "
            "addresses; unset both, or restore the values that SkyPilot set"
        )
    # Several tasks may share a cluster. Each needs a coordinator of its own.
    task = environment.get("SKYPILOT_TASK_ID", "")
    port = environment.get("JAX_COORDINATOR_PORT") or str(
        FIRST_PORT + zlib.crc32(task.encode()) % PORTS
    )
    host = f"[{hosts[0]}]" if ":" in hosts[0] else hosts[0]
    index = environment.get(names[1], "")
    return _checked(f"{host}:{port}", count, index, names, "SkyPilot")


def _checked(
    address: str, count: str, index: str, names: Sequence[str], source: str
) -> Processes:
    for name, value in zip(names, (count, index), strict=True):
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{name} is {value!r}; it must be a whole number")
    if int(index) >= int(count):
        raise UserError(
            f"{names[1]} is {index} and {names[0]} is {count}; processes are numbered "
            f"from 0 to {names[0]} - 1"
        )
    return Processes(address, int(count), int(index), source)


def _is(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _on_tpu() -> bool:
    kinds = (clusters.GkeTpuCluster, clusters.GceTpuCluster)
    return any(kind.is_env_present() for kind in kinds)


def detected() -> str:
    """The name of the cluster that JAX detects; empty where it detects none."""
    for kind in clusters.ClusterEnv._cluster_types:
        if not kind.opt_in_only_method and kind.is_env_present():
            return NAMES.get(kind.__name__, kind.__name__)
    return ""


def joined(source: str) -> Processes:
    """The processes that `jax.distributed.initialize` has joined."""
    state = distributed.global_state
    return Processes(
        str(state.coordinator_address), state.num_processes, state.process_id, source
    )


def check_slices(environment: Mapping[str, str], count: int) -> None:
    """Checks on TPUs that SkyPilot started one slice, so no slice trains on its own.

    Args:
      environment: variables of this process.
      count: processes that JAX has joined.

    Raises:
      UserError: SkyPilot started more hosts than the slice has.
    """
    nodes = environment.get("SKYPILOT_NUM_NODES", str(count))
    if nodes != str(count):
        raise UserError(
            f"SkyPilot started {nodes} hosts, and the TPU slice of this one has "
            f"{count}: each node is a slice of its own, and nothing joins them; set "
            "num_nodes: 1 and choose a larger slice"
        )


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The indices of a Slurm task's own GPUs, among those that it sees.

    None leaves the choice to JAX: there is no Slurm task, or no GPU. Within a task, JAX
    would take one GPU and leave the other GPUs of the node unused.

    Raises:
      UserError: the tasks of this node cannot share its GPUs evenly.
    """
    visible = [x for x in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    tasks = _tasks_here(environment)
    if not (visible and tasks) or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    on_node = int(environment.get("SLURM_GPUS_ON_NODE") or len(visible))
    # With --gpus-per-task a task sees only its own GPUs.
    if tasks == 1 or len(visible) * tasks == on_node:
        return list(range(len(visible)))
    share, rest = divmod(len(visible), tasks)
    if rest or not share:
        raise UserError(
            f"{tasks} tasks of this node see {len(visible)} GPUs and cannot share them "
            "evenly; change --processes-per-node or --gpus-per-node"
        )
    first = int(environment["SLURM_LOCALID"]) * share
    return list(range(first, first + share))


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of this Slurm step on this node, from `2(x3),1`; 0 without a step."""
    wanted = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_LOCALID")
    counts, node, local = (environment.get(name, "") for name in wanted)
    if not (counts and node and local):
        return 0
    tasks: list[int] = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks[int(node)]
