"""Nothing is launched that cannot fit, and a refusal says what to change."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import pytest
from commands import ROOT
from fake_tools import files, launch
from plan_helpers import big_config

from launch import __main__ as door
from launch import targets
from launch.jobs import fit_check
from launch.sweep import __main__ as sweep_door
from launch.targets import Target
from research.config.knobs import changed
from research.config.run_config import MeshConfig
from research.core.errors import UserError

CONFIG = f"--config={ROOT}/configs/pretrain_1b.py"
RECORD = """#!{python}
import json, os, sys
with open({file!r}, "a") as out:
    out.write(json.dumps([sys.argv, dict(os.environ)]) + "\\n")
"""


def refusal(config, *arguments, **named):
    with pytest.raises(UserError) as caught:
        fit_check.require_fit(config, *arguments, **named)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_what_fits_is_told():
    found = fit_check.require_fit(big_config(micro=16), "v5e:4x4")
    needed, usable = map(float, re.findall(r"([\d.]+) GiB", found))
    assert 0 < needed < usable == 14.5
    assert "v5e:4x4" in found


def test_what_does_not_fit_is_refused_by_its_numbers():
    said = refusal(big_config(rows=128, remat="none"), "l4:8")
    needed, usable = map(float, re.findall(r"([\d.]+) GiB", said)[:2])
    assert needed > usable == 20.6
    assert "l4:8" in said and fit_check.OVERRIDE in said


# By the knob that must change: shapes for which no other change helps.
TIGHT = {
    "data.microbatch_size": (
        big_config(rows=128, remat="dots"), "l4:8", "llama-1b"
    ),
    "mesh.fsdp": (big_config(micro=4, mesh=MeshConfig(data=-1)), "v5e:2x2", ""),
    "model.remat": (
        big_config(micro=32, rows=32, remat="none"), "v5e:4x4", "llama3.1-8b"
    ),
    "runtime.offload_optimizer": (
        big_config(micro=8, rows=8, seq=2048), "v5e:2x4", "llama3.1-8b"
    ),
    "mesh.data": (
        big_config(mesh=MeshConfig(replica=2, fsdp=1, data=-1)), "v5e:2x2", ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("knob", TIGHT)
def test_the_remedy_of_a_refusal_does_make_it_fit(knob):
    config, device, preset = TIGHT[knob]
    slices = config.mesh.replica
    said = refusal(config, device, slices, preset)
    assert "it fits with" in said
    knobs = dict(re.findall(r"--config\.([\w.]+)=(\w+)", said))
    assert knob in knobs
    read = {"True": True, "full": "full", "dots": "dots", "none": "none"}
    smaller = changed(config, {k: read.get(v) or int(v) for k, v in knobs.items()}, "")
    assert "fits" in fit_check.require_fit(smaller, device, slices, preset)


def test_where_no_knob_helps_the_least_and_more_chips_are_named():
    said = refusal(big_config(rows=8), "l4:1", preset="llama3.1-8b")
    assert "nothing fits l4:1: it needs at least" in said
    assert "the same training fits l4:" in said


BROKEN = {
    "mesh": (big_config(mesh=MeshConfig(tensor=3, fsdp=-1)), "h100:8", "h100:8: mesh"),
    "rows": (big_config(rows=64), "h100:6", "multiple of 6"),
    "heads": (big_config(mesh=MeshConfig(tensor=64)), "h100:64", "kv_heads"),
    "chip": (big_config(), "h10:8", "'h100'"),
    "slice": (big_config(), "v5e:3x3", "v5e:2x4"),
}


@pytest.mark.parametrize("config, device, said", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_split_is_refused(config, device, said):
    assert said in refusal(config, device)


def test_an_unknown_shape_is_refused_until_it_is_given():
    config = big_config("lora", micro=16)
    said = refusal(config, "v5e:4x4")
    assert "cannot be known" in said and "--preset=NAME" in said
    assert fit_check.OVERRIDE in said
    assert "fits" in fit_check.require_fit(config, "v5e:4x4", preset="llama-1b")


def test_the_environment_stays_as_it_was():
    before = dict(os.environ)
    fit_check.require_fit(big_config(micro=16), "v5e:4x4")
    refusal(big_config(rows=128, remat="none"), "l4:8")
    assert dict(os.environ) == before


def options(**given):
    return argparse.Namespace(**{"no_fit_check": False, "preset": "", **given})


def test_only_targets_that_rent_are_asked():
    too_large = big_config(rows=128, remat="none")

    def check(rents, chips, **more):
        target = types.SimpleNamespace(rents=lambda _: rents, chips=lambda *_: chips)
        return fit_check.check(target, [too_large], options(**more))

    assert check(False, ("l4:8", 1)) == []
    with pytest.raises(UserError, match="l4:8"):
        check(True, ("l4:8", 1))
    assert check(True, ("l4:8", 1), no_fit_check=True) == []
    assert "not checked" in check(True, None)[0]
    assert "add --device=h100" in check(True, None, device="")[0]


@pytest.mark.parametrize("name", targets.names())
def test_a_target_has_every_part(name):
    target = targets.find(name)
    parts = [part for part in vars(Target) if not part.startswith("_")]
    assert {"rents", "chips", "plan", "run"} <= set(parts)
    for part in [*parts, *Target.__annotations__]:
        assert hasattr(target, part), part


GPUS = {
    ("gke", "nvidia-tesla-a100"): "a100-40:16",
    ("gke", "nvidia-a100-80gb"): "a100-80:16",
    ("gke", "nvidia-h100-mega-80gb"): "h100:16",
    ("gke", "nvidia-h200-141gb"): "h200:16",
    ("gke", "nvidia-tesla-t4"): None,
    ("skypilot", "A100:8"): "a100-40:16",
    ("skypilot", "A100-80GB:8"): "a100-80:16",
    ("skypilot", "A100-80GB-SXM:8"): "a100-80:16",
    ("skypilot", "RTX4090:8"): "4090:16",
    ("skypilot", "V100:8"): None,
    ("slurm", "a100"): "a100-80:16",
    ("slurm", "RTX4090"): "4090:16",
}


@pytest.mark.parametrize("target, name", GPUS)
def test_each_clouds_names_are_of_the_memory_that_it_rents(target, name):
    named = options(
        gpu=name, accelerators=name, device=name, gpus_per_node=8, nodes=2, topology=""
    )
    found = targets.find(target).chips(named, big_config())
    assert found == (GPUS[target, name] and (GPUS[target, name], 1))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """`slurm(*own)` launches with a fake `sbatch`; gives the end and its calls."""
    folder, file = tmp_path / "bin", tmp_path / "bin" / "calls"
    folder.mkdir()
    (folder / "sbatch").write_text(RECORD.format(python=sys.executable, file=str(file)))
    (folder / "sbatch").chmod(0o755)
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)

    def run(*own):
        done = subprocess.run(
            [sys.executable, "-m", "launch", "slurm", *own, "--", CONFIG],
            cwd=tmp_path, check=False, capture_output=True, text=True,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            },
        )  # fmt: skip
        lines = file.read_text().splitlines() if file.exists() else []
        return done, [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_launch_that_does_not_fit_makes_nothing(tmp_path, fake, more):
    fake("sbatch")
    own = ("--device=l4", "--gpus-per-node=1", *more)
    done = launch(tmp_path, "slurm", *own, "--", CONFIG, check=True)
    assert done.returncode == 2 and not done.stdout and not fake.calls()
    (line,) = done.stderr.splitlines()
    assert "GiB usable per chip on l4:1" in line
    assert not files(tmp_path)


def test_an_overridden_one_is_launched(tmp_path, fake):
    fake("sbatch")
    own = ("--device=l4", "--gpus-per-node=1", fit_check.OVERRIDE)
    done = launch(tmp_path, "slurm", *own, "--", CONFIG, check=True)
    assert done.returncode == 0 and len(fake.calls()) == 1


def test_one_that_fits_is_launched_in_the_users_own_environment(slurm):
    """Variables that the planner and JAX's import set must not reach the job."""
    done, ((_, environment),) = slurm("--device=h100", "--gpus-per-node=8", "--nodes=2")
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stderr and "h100:16" in done.stderr
    assert not {"JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"} & environment.keys()


QUICK = """
import sys
from launch import __main__ as door
from research.core.errors import UserError
config, *mistyped = sys.argv[1:]
for own in mistyped:
    try:
        door.main(["launch", "slurm", *own.split(), "--", config])
    except UserError as error:
        print(str(error).replace("\\n", " "))
assert "jax" not in sys.modules, "a mistyped flag has waited for JAX"
"""


MISTYPED = {
    "--device=h10": "did you mean 'h100'?",
    "--device=h100": "needs --gpus-per-node",
    "--settings=gpu-cublass": "did you mean 'gpu-cublas'?",
    "--device=h100 --gpus-per-node=8 --nodes=0": "--nodes: 0 is below 1",
    "--gpus 8 --time=1:00": "--gpus is called --gpus-per-node here",
    "--nproc_per_node=8": "--gpus-per-node here: the GPUs of one node, all of which",
    "--nnodes=2 --account=a": "--nnodes is called --nodes=2 here",
    "--partitoin=a": "did you mean 'partition'?",
    "--tensor_parallel_size=2": "--config.mesh.tensor=2 after --",
    "--config.steps=2": "write it after --",
    "nodes=2": "nodes is called --nodes=2 here",
    "--colour=2": "--colour is not a flag;",
}


def test_a_mistyped_target_gets_the_nearest_one():
    for given in (["slrum"], ["tpu_vm", "--", "--config=x.py"]):
        with pytest.raises(UserError, match=r"did you mean '(slurm|tpu-vm)'"):
            door.main(["launch", *given])
    with pytest.raises(UserError, match=r"choose from .* \(did you mean 'create'"):
        door.main(["launch", "tpu-vm", "--do=creat", "--", "--config=x.py"])


def test_a_flag_of_launch_behind_the_dashes_is_sent_before_them():
    trainer = ["--config=x.py", "--config.name=a"]
    for flag in ("--preset=a", "--dry-run", "--gpus_per_node 8", "--no-fit-check"):
        with pytest.raises(
            UserError, match=f"^{flag} is a flag of launch: .* before --"
        ):
            door.main(["launch", "slurm", "--", *trainer, *flag.split()])
    with pytest.raises(UserError, match=r"--seeds=1 is a flag of launch\.sweep: write"):
        sweep_door.parse(["--sweep=x.py"], ["--seeds=1"])
    with pytest.raises(UserError, match="no such file"):  # One of another target.
        door.main(["launch", "slurm", "--", *trainer[:1]])


def test_a_mistyped_flag_is_answered_without_jax():
    done = subprocess.run(
        [sys.executable, "-c", QUICK, CONFIG, *MISTYPED],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for own, said in zip(MISTYPED, done.stdout.splitlines(), strict=True):
        assert MISTYPED[own] in said


def test_a_config_says_what_it_is_of():
    """The plan is of the config that is launched, not of the file's defaults."""
    small = dataclasses.replace(
        big_config(), data=dataclasses.replace(big_config().data, microbatch_size=16)
    )
    more = fit_check.require_fit(big_config(micro=32), "v5e:4x4")
    less = fit_check.require_fit(small, "v5e:4x4")
    numbers = [float(re.findall(r"([\d.]+) GiB", x)[0]) for x in (less, more)]
    assert numbers[0] < numbers[1]
