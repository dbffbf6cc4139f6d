"""A start says what it was made of, and no secret."""

import json
import shutil
import subprocess

import pytest

from research.runs import provenance


@pytest.fixture
def repository(tmp_path):
    if not shutil.which("git"):
        pytest.skip("no git on PATH")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "code.py").write_text("1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    return tmp_path


def test_the_commit_is_told_and_whether_files_differ(repository):
    clean = provenance.code_version(repository)
    assert len(clean) == 40
    (repository / "code.py").write_text("2\n")
    assert provenance.code_version(repository) == f"{clean}-dirty"


def test_no_repository_is_said(tmp_path):
    assert provenance.code_version(tmp_path) == "unknown"


def test_a_repository_around_the_code_is_not_its_own(repository):
    (repository / "site-packages").mkdir()
    assert provenance.code_version(repository / "site-packages") == "unknown"


def test_what_a_launcher_says_of_the_code_counts(repository):
    found = provenance.describe({"RESEARCH_CODE_VERSION": "abc"}, repository)
    assert found["code"] == "abc"


def test_secrets_are_told_by_name_alone(tmp_path):
    environment = {
        "HF_TOKEN": "canary",
        "JAX_API_KEY": "canary",
        "UNKNOWN": "canary",
        "XLA_FLAGS": "--a=1",
    }
    found = provenance.describe(environment, tmp_path)
    assert found["secrets"] == ["HF_TOKEN", "JAX_API_KEY"]
    assert found["environment"] == {"XLA_FLAGS": "--a=1"}
    assert "canary" not in json.dumps(found)


def test_packages_that_compute_are_told():
    assert {"jax", "jaxlib", "flax", "optax"} <= provenance.describe()[
        "packages"
    ].keys()


def test_every_start_of_a_run_has_it(place, unbroken):
    history = json.loads((place.run_dir("unbroken") / "run.json").read_text())
    made = history["starts"][-1]["provenance"]
    assert "research.train" in made["command"]
    assert made["environment"]["JAX_PLATFORMS"] == "cpu"
