"""A JobSet that clusters accept and that ends as the trainer does; SkyPilot's tasks."""

import copy
import os
import re
import subprocess
import sys

import pytest
import yaml
from fake_tools import COMMIT, NASTY, options_of
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError
from shell import SHELLCHECK, check

from launch.jobs import restart_policy
from launch.targets import find
from research.core.errors import PREEMPTED, STUCK
from research.runs import provenance

EXPANDED = (*NASTY, "$(HOME)", "$$(HOME)", "$$", "a$", "${HOME}", "$(HOME")
SHOW = """#!{python} -IS
import json, sys
print(json.dumps(sys.argv[1:]))
"""


def rendered(target, job, *flags):
    (text,) = find(target).plan([job], options_of(target, *flags)).files.values()
    return yaml.safe_load(text)


def pod_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


SHAPES = {
    "one host": ("--topology=v5e:2x4",),
    "slices": ("--topology=v5p:2x2x2", "--slices=2", "--queue=q", "--secret=hub"),
    "gpus": ("--gpus-per-node=8", "--nodes=2", "--gpu=nvidia-l4", "--volume=b:/b"),
}


@pytest.mark.parametrize("flags", SHAPES.values(), ids=SHAPES)
def test_a_jobset_loses_nothing_in_its_schema(cloud_job, flags):
    """The models drop what they do not know: what goes in must come out."""
    jobset = rendered("gke", cloud_job("a"), *flags)

    def through(given):
        return JobsetV1alpha2JobSet.from_dict(copy.deepcopy(given)).to_dict()

    assert through(jobset) == jobset
    wrong = copy.deepcopy(jobset)
    pod_of(wrong)["containers"][0]["comand"] = ["python"]
    assert through(wrong) != wrong
    wrong = copy.deepcopy(jobset)
    job = wrong["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["podFailurePolicy"]["rules"] = [{"action": "Forgive"}]
    with pytest.raises(ValidationError):
        through(wrong)


def test_kueue_gets_its_label_and_keeps_its_field(cloud_job):
    """There is no package with Kueue's schema: a label is all that it reads of a
    JobSet, and it alone sets `suspend`."""
    jobset = rendered("gke", cloud_job("a"), "--queue=team")
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert "suspend" not in jobset["spec"]
    assert "suspend" not in jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    unqueued = rendered("gke", cloud_job("a"))
    assert not [x for x in unqueued["metadata"]["labels"] if "kueue" in x]


def expand(text, variables):
    """Kubernetes' rule for commands: `$$` is `$`, `$(NAME)` a variable's value.

    A name that is no variable stays as it is written.
    """
    out, at = "", 0
    while at < len(text):
        two, end = text[at : at + 2], text.find(")", at)
        if two == "$$":
            out, at = out + "$", at + 2
        elif two == "$(" and end >= 0:
            name = text[at + 2 : end]
            out, at = out + variables.get(name, text[at : end + 1]), end + 1
        else:
            out, at = out + text[at], at + 1
    return out


@pytest.mark.parametrize("name", EXPANDED)
def test_a_jobset_runs_the_words_that_were_given(cloud_job, name):
    """No shell reads them, and what Kubernetes replaces in them gives them back."""
    job = cloud_job(name)
    container = pod_of(rendered("gke", job))["containers"][0]
    words = [expand(word, {"HOME": "/broken-out"}) for word in container["command"]]
    assert words[:3] == ["python", "-m", "research.train"]
    assert f"--note={name}" in words
    assert f"--config.run_dir=/shelf/runs/{name}" in words
    assert "args" not in container
    assert expand("$(HOME)", {"HOME": "/root"}) == "/root"


def ends(jobset, code, conditions=()):
    """Return the fate of a JobSet after one pod ends so, by Kubernetes' rules.

    The first pod rule that is met counts; a Job that it fails says which one it was,
    and the first rule of the JobSet that this meets counts.
    """
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "LaunchJob has reached its limit"
    assert job["backoffLimit"] == 0  # One that counts is one too many.
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"values": ()})["values"]
        if code in codes or any(
            x in rule.get("onPodConditions", ()) for x in conditions
        ):
            if rule["action"] == "Ignore":
                return "ReplacePod"
            reason = "PodFailurePolicy"
            message = f"Container failed, matching FailJob rule at index {index}"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        said = any(re.search(pattern, message) for pattern in patterns)
        if reason in rule["onJobFailureReasons"] and said:
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("flags", SHAPES.values(), ids=SHAPES)
def test_a_jobset_ends_as_the_policy_says(cloud_job, flags):
    jobset = rendered("gke", cloud_job("a"), *flags, "--restarts=5")
    # A pod alone is replaced; of several all begin again. Neither is a retry.
    command = pod_of(jobset)["containers"][0]["command"]
    several = "--config.runtime.distributed=true" in command
    free = "RestartJobSetAndIgnoreMaxRestarts" if several else "ReplacePod"
    for code in restart_policy.FINAL - {0}:
        assert ends(jobset, code) == "FailJobSet"
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    assert ends(jobset, PREEMPTED) == ends(jobset, 137, [disrupted]) == free
    assert ends(jobset, 4, [disrupted]) == "FailJobSet"
    for code in (1, STUCK, 134, 137):
        assert restart_policy.again(code, 1) and ends(jobset, code) == "RestartJobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    # The rules want pods that are never started again in place.
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_hosts_of_a_slice_are_pods_and_each_asks_for_its_chips(cloud_job):
    known = {
        "v5e:2x4": (1, 8),
        "v5e:4x4": (4, 4),
        "v4:2x2x1": (1, 4),
        "v6e:1x1": (1, 1),
    }
    for topology, (hosts, chips) in known.items():
        jobset = rendered("gke", cloud_job("a"), f"--topology={topology}")
        (task,) = jobset["spec"]["replicatedJobs"]
        job, (container,) = task["template"]["spec"], pod_of(jobset)["containers"]
        assert job["parallelism"] == job["completions"] == hosts
        assert container["resources"]["limits"] == {"google.com/tpu": chips}
        several = "--config.runtime.distributed=true" in container["command"]
        assert several == (hosts > 1)
        # GKE tells JAX of TPUs.
        assert [x["name"] for x in container["env"]] == [provenance.CODE_VERSION]


def test_gpu_pods_find_each_other(cloud_job):
    jobset = rendered("gke", cloud_job("a"), "--gpus-per-node=8", "--nodes=3")
    (container,) = pod_of(jobset)["containers"]
    env = {x["name"]: x for x in container["env"]}
    name, (task,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    first = f"{name}-{task['name']}-0-0.{name}"  # JobSet's name of pod 0 of job 0.
    assert env["JAX_COORDINATOR_ADDRESS"]["value"].rpartition(":")[0] == first
    assert env["JAX_NUM_PROCESSES"]["value"] == "3"
    assert "job-completion-index" in str(env["JAX_PROCESS_ID"]["valueFrom"])
    assert task["template"]["spec"]["completions"] == 3


def test_each_job_is_created(tmp_path, fake, monkeypatch, cloud_job):
    fake("kubectl")
    monkeypatch.chdir(tmp_path)
    options = options_of("gke")
    plan = find("gke").plan([cloud_job("a b"), cloud_job("c")], options)
    assert find("gke").run(plan, options) == 0
    for call in fake.calls():
        assert call[1] == "create"
        with open(call[2].partition("=")[2]) as file:
            assert yaml.safe_load(file)["kind"] == "JobSet"
    fake.answer("kubectl", "a-b.jobset.yaml", code=3)
    fake.answer("kubectl", "a b.jobset.yaml", code=3)
    before = len(fake.calls())
    assert find("gke").run(plan, options) == 3
    assert len(fake.calls()) == before + 2, "one that is refused keeps no other back"


@pytest.mark.parametrize("name", NASTY)
def test_no_name_breaks_out_of_a_sky_script(tmp_path, fake, cloud_job, name):
    """The script runs for real."""
    fake.git()
    flags = ("--accelerators=H100:8", "--nodes=2")
    task = rendered("skypilot", cloud_job(name), *flags)
    python = tmp_path / "home it's/research-env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(SHOW.format(python=sys.executable))
    python.chmod(0o755)
    home = {"HOME": str(python.parents[2])}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | home,
        capture_output=True, check=True,
    )  # fmt: skip
    words = yaml.safe_load(done.stdout)
    assert f"--note={name}" in words
    assert f"--config.run_dir=/mnt/research/runs/{name}" in words
    assert not list(tmp_path.rglob("canary"))


def test_a_sky_job_is_recovered_and_not_tried_in_vain(fake, cloud_job):
    fake.git()
    task = rendered("skypilot", cloud_job("a"), "--spot")
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["accelerators"] == "tpu-v5litepod-16"
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [PREEMPTED]
    assert recovery["max_restarts_on_errors"] == 0
    assert task["envs"] == {"RESEARCH_CODE_VERSION": COMMIT}


def test_sky_is_told_of_secrets_by_name(tmp_path, fake, monkeypatch, cloud_job):
    fake.git()
    fake("sky")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-hub")
    options = options_of("skypilot", "--secret=HF_TOKEN")
    plan = find("skypilot").plan([cloud_job("a")], options)
    assert find("skypilot").run(plan, options) == 0
    (call,) = [x for x in fake.calls() if x[0].endswith("sky")]
    assert call[1:3] == ["jobs", "launch"]
    assert call[call.index("--secret") + 1] == "HF_TOKEN"
    written = (tmp_path / "runs/a.sky.yaml").read_text()
    assert yaml.safe_load(written)["secrets"] == {"HF_TOKEN": None}
    assert "canary" not in written + str(call)


@pytest.mark.parametrize("flags", [(), ("--accelerators=H100:8", "--nodes=2")])
def test_sky_takes_the_task(fake, monkeypatch, cloud_job, flags):
    """By its own schemas and its own parser, where it is installed (by hand: it is
    large)."""
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    schemas = pytest.importorskip("sky.utils.schemas")
    fake.git()
    task = rendered("skypilot", cloud_job("it's $HOME"), *flags, "--secret=HF_TOKEN")
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    read = sky.Task.from_yaml_config(copy.deepcopy(task), secrets_overrides=[
        ("HF_TOKEN", "x")])  # fmt: skip
    assert read.run == task["run"] and read.num_nodes == task["num_nodes"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task | {"rnu": ""}, schemas.get_task_schema())


@SHELLCHECK
@pytest.mark.parametrize("flags", [(), ("--accelerators=H100:8", "--nodes=2")])
def test_sky_scripts_are_clean(fake, cloud_job, flags):
    fake.git()
    task = rendered("skypilot", cloud_job("a"), *flags)
    check(task["run"])
    check(task["setup"])
