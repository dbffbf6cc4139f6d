"""In simulated clusters, every process finds the coordinator, its number and the count.

JAX's own detection runs; only what it would connect to is replaced by a recorder, and
Google's metadata server by one on this machine.
"""

import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
import types

import pytest
from commands import ROOT
from free_ports import free_port
from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster, cluster
from waiting import PATIENCE

from launch.jobs import restart_policy
from research.config.run_config import RuntimeConfig
from research.core.errors import LonelyError, UserError
from research.parallel import process_discovery, runtime

# JAX's own, where it reads the metadata.
pytestmark = pytest.mark.filterwarnings("ignore:'maxsplit' is passed as positional")
FAMILIES = (
    "SLURM_", "JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS", "JAX_LOCAL", "OMPI_",
    "SKYPILOT_", "TPU_", "MEGASCALE_", "KUBERNETES_", "CUDA_VISIBLE",
)  # fmt: skip


@pytest.fixture
def join(monkeypatch, caplog):
    """`join(**environment)` gives (address, count, index) that JAX would connect by."""
    calls, taken = [], {}
    fake = types.SimpleNamespace(
        get_distributed_runtime_service=lambda address, count, **_: calls.append(
            ("service", count)
        ),
        get_distributed_runtime_client=lambda address, index, **_: (
            calls.append(("client", address, index))
            or types.SimpleNamespace(connect=lambda: None)
        ),
        create_preemption_sync_manager=lambda: types.SimpleNamespace(
            initialize=lambda client: None
        ),
    )
    monkeypatch.setattr(distributed, "_jax", fake)
    monkeypatch.setattr(runtime.rendezvous, "meet", lambda processes, patience: None)
    monkeypatch.setattr(
        distributed.xla_bridge, "backends_are_initialized", lambda: False
    )
    for name in [x for x in os.environ if x.startswith(FAMILIES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(
        distributed.config, "update", lambda name, value: taken.update({name: value})
    )
    caplog.set_level("INFO")

    def run(flags=None, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "global_state", distributed.State())
        calls.clear()
        taken.clear()
        runtime._join_processes(RuntimeConfig(watchdog_s=60.0, **(flags or {})))
        if not calls:
            return None
        address, index = next(c[1:] for c in calls if c[0] == "client")
        count = distributed.global_state.num_processes
        # The first process, and no other, starts the coordinator, for all of them.
        services = [c[1] for c in calls if c[0] == "service"]
        assert services == ([count] if index == 0 else [])
        return address, count, index

    run.log = caplog
    run.gpus = lambda: taken.get("jax_cuda_visible_devices", "all")
    return run


def slurm(nodes, index, tasks_per_node=1, job=4097):
    """The variables of task `index` of a step, as srun sets them."""
    node, local = divmod(index, tasks_per_node)
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": nodes[0],
        "SLURM_STEP_NUM_NODES": str(nodes[1]),
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks_per_node}(x{nodes[1]})",
        "SLURM_NTASKS": str(nodes[1] * tasks_per_node),
        "SLURM_PROCID": str(index),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
    }


NODES = {
    "tpu-a": ("tpu-a", 1),
    "alpha": ("alpha,beta", 2),
    "node007": ("node[007-009,012],late3", 5),
    "gpu3": ("gpu[3,8]", 2),
}


@pytest.mark.parametrize("first", NODES)
@pytest.mark.parametrize("tasks", [1, 2])
def test_slurm(join, first, tasks):
    count = NODES[first][1] * tasks
    found = [join(**slurm(NODES[first], i, tasks)) for i in range(count)]
    port = 4097 % 4096 + 61440
    assert found == [(f"{first}:{port}", count, i) for i in range(count)]
    assert f"{count} by Slurm, this one is number {count - 1}" in join.log.text


# (tasks a node, GPUs that a task sees, GPUs of the node) to what each task takes.
SHARES = {
    "one task, all GPUs": (1, 8, 8, ["0,1,2,3,4,5,6,7"] * 2),
    "a GPU a task": (4, 4, 4, ["0", "1", "2", "3"] * 2),
    "two GPUs a task": (2, 4, 4, ["0,1", "2,3"] * 2),
    "bound by --gpus-per-task": (2, 2, 4, ["0,1"] * 4),
    "one bound GPU a task": (2, 1, 2, ["0"] * 4),
}


@pytest.mark.parametrize("tasks, visible, on_node, taken", SHARES.values(), ids=SHARES)
def test_a_slurm_task_takes_its_share_of_the_gpus(join, tasks, visible, on_node, taken):
    found = []
    for index in range(2 * tasks):
        gpus = {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(visible))),
            "SLURM_GPUS_ON_NODE": str(on_node),
        }
        join(**slurm(("gpu[3,8]", 2), index, tasks), **gpus)
        found.append(join.gpus())
    assert found == taken


def test_gpus_that_tasks_cannot_share_are_refused(join):
    with pytest.raises(UserError, match="3 tasks of this node see 4 GPUs"):
        join(**slurm(("a", 1), 0, 3), CUDA_VISIBLE_DEVICES="0,1,2,3")


def test_the_users_own_choice_of_devices_stays(join):
    many = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_LOCAL_DEVICE_IDS": "2"}
    join(**slurm(("a", 1), 0), **many)
    assert join.gpus() == "2"


@pytest.fixture
def tpu(monkeypatch):
    """A host with TPUs, and a metadata server that answers from the dict given back."""
    attributes = {"tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda _: None)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda _: "10.0.0.2")
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield attributes
    server.shutdown()
    server.server_close()


def test_gke_with_one_slice(join, tpu):
    hosts = ",".join(f"run-slice-0-{i}.run" for i in range(4))
    found = [join(TPU_WORKER_HOSTNAMES=hosts, TPU_WORKER_ID=str(i)) for i in range(4)]
    assert found == [("run-slice-0-0.run:8482", 4, i) for i in range(4)]
    assert "4 by GKE TPU, this one is number 3" in join.log.text


def test_gke_with_two_slices(join, tpu):
    found = [
        join(
            TPU_WORKER_HOSTNAMES=f"run-slice-{part}-0.run,run-slice-{part}-1.run",
            TPU_WORKER_ID=str(worker),
            MEGASCALE_NUM_SLICES="2",
            MEGASCALE_SLICE_ID=str(part),
            MEGASCALE_COORDINATOR_ADDRESS="run-slice-0-0.run:8080",
        )
        for part, worker in itertools.product(range(2), range(2))
    ]
    assert found == [("run-slice-0-0.run:8482", 4, i) for i in range(4)]


@pytest.mark.parametrize("form", ["{0}", "w{0}:9:{0}"], ids=["hosts", "triples"])
def test_a_tpu_vm(join, tpu, form):
    addresses = ["10.1.0.7", "10.1.0.3", "10.1.0.5"]
    tpu["worker-network-endpoints"] = ",".join(form.format(a) for a in addresses)
    for index in range(3):
        tpu["agent-worker-number"] = str(index)
        assert join() == ("10.1.0.7:8482", 3, index)
    assert "3 by Cloud TPU, this one is number 2" in join.log.text


def test_tpu_vms_of_two_slices(join, tpu):
    for index in range(4):
        part, worker = divmod(index, 2)
        tpu["agent-worker-number"] = str(worker)
        tpu["worker-network-endpoints"] = f"10.{part}.0.1,10.{part}.0.2"
        tpu["tpu-env"] = (
            f"MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '{part}'\n"
            "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'"
        )
        assert join() == ("10.0.0.1:8482", 4, index)


def sky(rank, addresses=("10.0.0.4", "10.0.0.9", "10.0.0.6"), **more):
    return {
        "SKYPILOT_NODE_IPS": "\n".join(addresses),
        "SKYPILOT_NUM_NODES": str(len(addresses)),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_TASK_ID": "sky-managed-2026-01-01_run_7-0",
    } | more


def test_skypilot(join):
    found = [join(**sky(i)) for i in range(3)]
    port = found[0][0].rpartition(":")[2]
    assert found == [(f"10.0.0.4:{port}", 3, i) for i in range(3)]
    assert 61440 <= int(port) <= 65535
    # Another task of the cluster has another coordinator.
    assert join(**sky(0, SKYPILOT_TASK_ID="other"))[0] != found[0][0]
    assert join(**sky(0, JAX_COORDINATOR_PORT="1234"))[0] == "10.0.0.4:1234"
    assert join(**sky(0, ("fe80::1", "fe80::2")))[0] == "[fe80::1]:1234"
    assert "3 by SkyPilot, this one is number 2" in join.log.text


def test_skypilot_takes_every_gpu_of_a_node(join):
    join(**sky(1), CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert join.gpus() == "all"


def test_one_node_of_skypilot_has_nobody_to_join(join):
    assert join(**sky(0, ("10.0.0.4",))) is None
    assert "none to join" in join.log.text


def test_skypilot_on_a_tpu_pod_leaves_it_to_the_pod(join, tpu):
    """SkyPilot and libtpu may number the hosts of a slice differently."""
    tpu["worker-network-endpoints"] = "10.0.0.9,10.0.0.4,10.0.0.6"
    tpu["agent-worker-number"] = "1"
    assert join(**sky(0)) == ("10.0.0.9:8482", 3, 1)


def test_slices_that_nothing_joins_are_refused(join, tpu):
    tpu["worker-network-endpoints"], tpu["agent-worker-number"] = "10.0.0.4", "0"
    with pytest.raises(UserError, match="started 3 hosts, and the TPU slice"):
        join(**sky(0))


def named(address="host:1234", count="4", index="2"):
    return dict(zip(process_discovery.EXPLICIT, (address, count, index), strict=True))


@pytest.mark.parametrize("around", [{}, slurm(("a,b", 2), 0), sky(0)])
def test_explicit_variables_come_first(join, around):
    assert join(**around, **named()) == ("host:1234", 4, 2)
    assert join.gpus() == "all", "JAX has detected a cluster, too"
    assert "4 by JAX_* variables, this one is number 2" in join.log.text


FLAGS = {"coordinator_address": "other:99", "num_processes": 3, "process_id": 0}


@pytest.mark.parametrize("around", [{}, slurm(("a,b", 2), 0), sky(0), named()])
def test_flags_come_before_all_else(join, around):
    assert join(FLAGS, **around) == ("other:99", 3, 0)
    assert "3 by flags, this one is number 0" in join.log.text


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_processes": 0}, r"config\.runtime\.num_processes is not: set all three"),
        ({"process_id": -1}, r"config\.runtime\.process_id is not: set all three"),
        ({"process_id": -2}, r"config\.runtime\.process_id is '-2'"),
        ({"process_id": 3}, "process_id is 3 and config.runtime.num_processes is 3"),
        ({"coordinator_address": "other"}, "coordinator_address is 'other'.*HOST:PORT"),
    ],
)
def test_flags_that_are_incomplete_are_named(join, changes, said):
    with pytest.raises(UserError, match=said):
        join(FLAGS | changes)


def test_one_explicit_process_has_nobody_to_join(join):
    assert join(**named(count="1", index="0")) is None


BAD = {
    "no count": (named(count=""), "JAX_NUM_PROCESSES is not"),
    "only an address": (
        named(count="", index=""),
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID are not",
    ),
    "no port": (named("host"), "HOST:PORT"),
    "no number": (named(count="four"), "JAX_NUM_PROCESSES is 'four'"),
    "negative": (named(index="-1"), "JAX_PROCESS_ID is '-1'"),
    "too high": (named(index="4"), "JAX_PROCESS_ID is 4 and JAX_NUM_PROCESSES is 4"),
    "none at all": ({}, "set JAX_COORDINATOR_ADDRESS"),
    "no rank": (sky(""), "SKYPILOT_NODE_RANK is ''"),
    "rank too high": (sky(3), "SKYPILOT_NODE_RANK is 3 and SKYPILOT_NUM_NODES is 3"),
    "another number": (sky(0, SKYPILOT_NUM_NODES="2"), "has 3 addresses"),
}


@pytest.mark.parametrize("environment, said", BAD.values(), ids=BAD)
def test_what_is_incomplete_is_named(join, environment, said):
    with pytest.raises(UserError, match=said) as error:
        join(**environment)
    assert "\n" not in str(error.value)


def test_processes_that_do_not_answer_may_at_the_next_start(join, monkeypatch):
    """A machine that comes late is not an error that a person must fix."""

    def silent():
        raise RuntimeError("DEADLINE_EXCEEDED: barrier\nmore")

    client = types.SimpleNamespace(connect=silent)
    monkeypatch.setattr(
        distributed._jax,
        "get_distributed_runtime_client",
        lambda address, index, **_: client,
    )
    with pytest.raises(LonelyError, match="DEADLINE_EXCEEDED") as error:
        join(**named())
    assert restart_policy.again(error.value.exit_code, 1)
    assert "\n" not in str(error.value)


PROGRAM = """
import json
import jax
from research.core.errors import UserError
from research.parallel import agreement, runtime
from research.config.run_config import RuntimeConfig
runtime.start(RuntimeConfig(distributed=True, compilation_cache=""))
index = str(jax.process_index())
assert agreement.together(lambda: index, lambda _: {"seed": "0"}) == index
assert agreement.of_first(index) == "0"
assert not agreement.everywhere(index == "0")
try:
    agreement.together(lambda: index, lambda _: {"seed": index, "data": "d"})
except UserError as error:
    print(json.dumps([jax.process_index(), jax.process_count(), str(error)]))
"""


def test_two_real_processes_join_by_skypilots_variables_and_agree():
    port = str(free_port())
    known = {k: v for k, v in os.environ.items() if not k.startswith(FAMILIES)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=known
            | sky(i, ("127.0.0.1", "127.0.0.1"), JAX_COORDINATOR_PORT=port)
            | {"JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    done = [process.communicate(timeout=2 * PATIENCE) for process in running]
    said = [json.loads(out.splitlines()[-1]) for out, _ in done]  # Gloo speaks, too.
    assert [found[:2] for found in said] == [[0, 2], [1, 2]]
    for *_, text in said:
        assert text.startswith(
            "processes 0 and 1 of this run differ:\n  seed: 0 and 1\n"
        )
    line = (
        f"processes: 2 by SkyPilot, this one is number 1, coordinator 127.0.0.1:{port}"
    )
    assert line in done[1][1]
