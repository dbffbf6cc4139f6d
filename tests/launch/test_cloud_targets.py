"""The commands of the cloud targets match kept texts; bad requests are refused.

The kept texts are in tests/golden/launch. `RECORD_LAUNCH=1 pytest
tests/launch/test_cloud_targets.py` records them again: read the difference first.
"""

import os
import re
import types

import pytest
from fake_tools import FLAGS, ROOT, files, launch, options_of

from configs import finetune_8b
from launch.clouds import tpu_slices
from launch.targets import find
from research.config.run_config import from_config_dict
from research.config.saved_config import to_json
from research.core.errors import UserError
from research.parallel.chips import CHIPS
from research.plan import fit_advice

KEPT = ROOT / "tests/golden/launch"
CONFIG = f"--config={ROOT}/configs/finetune_8b.py"  # runtime.topology is v5e:4x4
TOOLS = {"tpu-vm": "gcloud", "gke": "kubectl", "skypilot": "sky"}
CASES = {
    "tpu-vm": ("--project=acme", "--secret=HF_TOKEN"),
    "tpu-vm queued": ("--spot", "--queued", "--type=v5p-8", "--keep"),
    "gke": ("--queue=team", "--slices=2", "--secret=hub"),
    "gke gpus": ("--gpus-per-node=8", "--nodes=2", "--gpu=nvidia-h100-80gb"),
    "skypilot": ("--spot", "--secret=HF_TOKEN", "--infra=gcp"),
    "skypilot gpus": ("--accelerators=H100:8", "--nodes=2", "--restarts=1"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_is_as_kept_and_does_nothing(tmp_path, fake, monkeypatch, case):
    target = case.partition(" ")[0]
    fake.git()
    fake(TOOLS[target])
    canaries = {"HF_TOKEN": "canary-of-the-hub", "WANDB_API_KEY": "canary-of-wandb"}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    before = files(tmp_path)
    own = (*FLAGS[target], *CASES[case], "--dry-run")
    done = launch(tmp_path, target, *own, "--", CONFIG, "--config.steps=3")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == before
    assert all(call[0].endswith("git") for call in fake.calls())
    assert not [x for x in canaries.values() if x in done.stdout + done.stderr]
    text = done.stdout.replace(str(ROOT), "CODE").replace(str(tmp_path), "HERE")
    kept = KEPT / f"{case.replace(' ', '_')}.txt"
    if os.environ.get("RECORD_LAUNCH"):
        kept.write_text(text)
    assert text == kept.read_text()


BAD = {
    "no zone": ("tpu-vm", ("--zone=",), {}, "--zone="),
    "no such type": ("tpu-vm", ("--type=v5e-16",), {}, "v5litepod-16"),
    "run would be lost": ("tpu-vm", ("--bucket=",), {}, "--bucket=NAME"),
    "run on the VM's own disk": (
        "tpu-vm", ("--bucket=",), {"run_dir": "/home/me/x"}, "--bucket=NAME"),
    "run leads out": ("tpu-vm", (), {"run_dir": "../x"}, "must lie in"),
    "no such topology": ("tpu-vm", (), {"topology": "v5e:3x3"}, "v5e:4x4"),
    "shape without a type": ("tpu-vm", (), {"topology": "v5p:4x4x12"}, "no acc"),
    "a secret's value": ("tpu-vm", ("--secret=HF_TOKEN=oops",), {}, "never a value"),
    "no image": ("gke", ("--image=",), {}, "--image="),
    "no claim": ("gke", ("--volume=/d",), {}, "CLAIM:/PATH"),
    "no path": ("gke", ("--volume=c:d",), {}, "CLAIM:/PATH"),
    "no topology": ("gke", (), {"topology": ""}, "--topology=v5e:4x4"),
    "unknown chip": ("gke", ("--topology=v7:4x4",), {}, "'v7'"),
    "one host, two slices": (
        "gke", ("--topology=v5e:2x4", "--slices=2"), {}, "one host"),
    "slices of GPUs": ("gke", ("--gpus-per-node=8", "--slices=2"), {}, "--nodes"),
    "no slice": ("gke", ("--slices=-1",), {}, "--slices: -1 is below 0"),
    "run outside the volume": ("gke", (), {"run_dir": "/elsewhere/x"}, "/shelf"),
    "a Secret's value": ("gke", ("--secret=hf_Oops",), {}, "never a value"),
    "rows of this machine": ("tpu-vm", (), {"rows": __file__}, "copy it there"),
    "rows in a list": ("gke", (), {"rows": f"/no,{__file__}"}, f"path is {__file__}"),
    "a model of this machine": ("skypilot", (), {"start": str(ROOT)}, "init_from"),
    "rows not in the volume": ("gke", (), {"rows": __file__}, "/shelf: copy"),
    "no bucket": ("skypilot", ("--bucket=",), {}, "gs://NAME"),
    "a bucket that cannot rename": ("skypilot", ("--bucket=s3://b",), {}, "gs://"),
    "several slices": ("tpu-vm", (), {"slices": 2}, "launch it on gke"),
    "several of SkyPilot": (
        "skypilot", ("--accelerators=tpu-v5litepod-16",), {"slices": 2}, "on gke"),
    "several TPU nodes": ("skypilot", ("--nodes=2",), {}, "--nodes is 2"),
}  # fmt: skip


@pytest.mark.parametrize("target, own, wrong, said", BAD.values(), ids=list(BAD))
def test_bad_input_is_one_line_and_nothing_is_made(
    tmp_path, fake, monkeypatch, cloud_job, target, own, wrong, said
):
    fake.git()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        find(target).plan([cloud_job("a", **wrong)], options_of(target, *own))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert "oops" not in str(refused.value).lower()
    assert files(tmp_path) == set()


OUTSIDE = {
    "no such step": ("tpu-vm", ("--do=fly",), CONFIG, "fly"),
    "no volume": ("gke", ("--image=i",), CONFIG, "--volume=CLAIM:/PATH"),
    "run as config": (
        "gke", FLAGS["gke"], "--config=run", "the config file that it was made with"),
    "config outside": ("gke", FLAGS["gke"], "--config=config.py", "put it there"),
    "unset secret": (
        "skypilot", (*FLAGS["skypilot"], "--secret=UNSET"), CONFIG, "UNSET"),
}  # fmt: skip


@pytest.mark.parametrize("target, own, config, said", OUTSIDE.values(), ids=OUTSIDE)
def test_so_it_is_from_the_door(tmp_path, fake, target, own, config, said):
    fake(TOOLS[target])
    (tmp_path / "config.py").write_bytes((ROOT / "configs/finetune_8b.py").read_bytes())
    (tmp_path / "run").mkdir()
    kept = to_json(from_config_dict(finetune_8b.get_config()))
    (tmp_path / "run" / "config.json").write_text(kept)
    before = files(tmp_path)
    done = launch(tmp_path, target, *own, "--", config)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert files(tmp_path) == before and not fake.calls()


REMEDIES = {
    "tpu-vm": ("git", "Google Cloud CLI"),
    "gke": ("", "gcloud components install kubectl"),
    "skypilot": ("", 'pip install "skypilot[gcp]"'),
}


@pytest.mark.parametrize("target", TOOLS)
def test_a_missing_tool_is_named_with_what_to_install(
    tmp_path, fake, monkeypatch, target
):
    fake.git()
    monkeypatch.setenv("PATH", str(fake.folder))
    done = launch(tmp_path, target, *FLAGS[target], "--", CONFIG)
    assert done.returncode == 2
    assert TOOLS[target] in done.stderr and REMEDIES[target][1] in done.stderr
    assert files(tmp_path) == set()


GIT = {
    "changed": ("status", {"out": " M a.py\n"}, "commit or stash"),
    "uncommitted config": ("ls-files", {"code": 1}, "configs/finetune_8b.py"),
    "uncommitted rows": ("-- rows.jsonl", {"code": 1}, "rows.jsonl is not in it"),
    "no repository": ("--show-toplevel", {"code": 128}, "no git repository"),
}


@pytest.mark.parametrize("when, answer, said", GIT.values(), ids=list(GIT))
def test_what_git_archive_would_leave_behind_is_refused(
    tmp_path, fake, when, answer, said
):
    fake("git")
    fake.answer("git", when, **answer)
    fake.answer("git", "--show-toplevel", out=f"{ROOT}\n")
    rows = "--config.data.path=rows.jsonl"
    done = launch(tmp_path, "tpu-vm", *FLAGS["tpu-vm"], "--dry-run", "--", CONFIG, rows)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize("target", TOOLS)
def test_a_run_of_this_machine_is_no_start_elsewhere(
    tmp_path, fake, monkeypatch, cloud_job, target
):
    """A folder beside the code that git does not know is not sent with it."""
    fake.git()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    job = cloud_job("a", start="runs/mine")
    assert find(target).plan([job], options_of(target)).commands
    # As of what lies outside of the repository; 1 is tested above.
    fake.answer("git", "-- runs/mine", code=128)
    with pytest.raises(UserError, match="init_from is runs/mine, on this machine"):
        find(target).plan([job], options_of(target))


@pytest.mark.parametrize("target", TOOLS)
def test_several_jobs_are_told_apart(tmp_path, fake, monkeypatch, cloud_job, target):
    """Each job of a sweep has its own file and name, even if long names start alike."""
    fake.git()
    monkeypatch.chdir(tmp_path)
    alike = "lora-rank-of-a-very-long-sweep-that-tries-everything"
    jobs = [cloud_job(f"{alike}-{index}") for index in range(3)]
    plan = find(target).plan(jobs, options_of(target))
    texts = list(plan.files.values())
    assert len(texts) == 3
    for index, text in enumerate(texts):
        assert f"{alike}-{index}" in text and f"{alike}-{(index + 1) % 3}" not in text
    if target != "tpu-vm":
        names = {line for x in texts for line in x.splitlines() if "name: lora" in line}
        assert len(names) == 3
    with pytest.raises(UserError, match="rename one"):
        find(target).plan([cloud_job("a b"), cloud_job("a-b")], options_of(target))


def test_types_count_cores_where_google_does():
    """https://cloud.google.com/tpu/docs/v5p and /v5e, tables of configurations."""
    known = {
        "v4:2x2x1": ("v4-8", 1),
        "v5e:1x1": ("v5litepod-1", 1),
        "v5e:2x4": ("v5litepod-8", 1),
        "v5e:4x4": ("v5litepod-16", 4),
        "v5p:2x2x1": ("v5p-8", 1),
        "v5p:2x2x2": ("v5p-16", 2),
        "v5p:4x4x4": ("v5p-128", 16),
        "v6e:16x16": ("v6e-256", 64),
    }
    for topology, (name, hosts) in known.items():
        found = tpu_slices.named(topology, "--topology")
        assert (found.type, found.hosts) == (name, hosts)
        assert tpu_slices.of_type(name, "--type") == found
    assert {c.name for c in CHIPS.values() if c.shapes} == set(tpu_slices.GENERATIONS)


@pytest.mark.parametrize(
    "target, words",
    [
        ("tpu-vm", ("v6e-16", "v2-alpha-tpuv6e")),
        ("gke", ("tpu-v6e-slice", "4x4")),
        ("skypilot", ("tpu-v6e-16",)),
    ],
)
def test_a_slice_of_v6e_is_launched(
    tmp_path, fake, monkeypatch, cloud_job, target, words
):
    """https://cloud.google.com/tpu/docs/v6e and the pages that `tpu_slices` names."""
    fake.git()
    monkeypatch.chdir(tmp_path)
    job = cloud_job("a", topology="v6e:4x4")
    plan = find(target).plan([job], options_of(target))
    text = "\n".join([*plan.files.values(), *map(str, plan.commands)])
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    "target, more, chips",
    [
        ("tpu-vm", ("--type=v5litepod-16",), "v5e:4x4"),
        ("gke", (), "v5e:4x4"),
        (
            "gke",
            ("--gpus-per-node=8", "--nodes=2", "--gpu=nvidia-h100-80gb"),
            "h100:16",
        ),
        ("skypilot", ("--accelerators=H100:8", "--nodes=2"), "h100:16"),
    ],
)
def test_what_does_not_fit_is_not_rented(
    tmp_path, fake, monkeypatch, target, more, chips
):
    # A search of seconds, which `test_fit_check` looks at.
    advice = types.SimpleNamespace(words="rent more")
    monkeypatch.setattr(fit_advice, "advise", lambda *_: advice)
    fake.git()
    for tool in ("gcloud", "kubectl", "sky"):
        fake(tool)
    before = files(tmp_path)
    config = f"--config={ROOT}/configs/pretrain_8b.py"
    training = ("--", config, "--config.runtime.topology=v5e:4x4")
    done = launch(tmp_path, target, *FLAGS[target], *more, *training, check=True)
    assert done.returncode == 2, done.stdout
    assert re.search(f"needs .* GiB .* on {chips} ", done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert files(tmp_path) == before
    assert all(call[0].endswith("git") for call in fake.calls())
