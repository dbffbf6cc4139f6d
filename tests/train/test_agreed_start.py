"""The processes of a run compare their facts before it starts."""

import dataclasses

import jax
import pytest

from research.config.knobs import changed
from research.config.run_config import Config, RuntimeConfig
from research.core.errors import UserError
from research.runs import provenance
from research.runs.run_directory import RunDir
from research.train import prepare_runs
from research.train.prepare_runs import OpenedFolder, facts_of_start


def facts(config, folder=None):
    opened = [OpenedFolder(config, folder, {})] if folder else []
    return facts_of_start([config], opened)


def differing(one, other):
    return {name for name in one | other if one.get(name) != other.get(name)}


CONFIG = Config(run_dir="runs/a", runtime=RuntimeConfig(distributed=True))


@pytest.fixture
def equal_code(monkeypatch):
    """Spares the tests the time to read it."""
    monkeypatch.setattr(prepare_runs.provenance, "shared_parts", dict)


@pytest.mark.parametrize(
    "knob",
    ["seed", "steps", "optim.learning_rate", "data.path", "text.sources", "mesh.data"],
)
def test_a_knob_that_differs_is_a_fact_that_differs(equal_code, knob):
    value = {"data.path": "b.jsonl", "text.sources": ("s=b",)}.get(knob, 7)
    other = changed(CONFIG, {knob: value}, "test")
    assert differing(facts(CONFIG), facts(other)) == {f"config.{knob}"}


def test_each_process_has_its_own_number_and_caches(equal_code):
    own = {
        "runtime.process_id": 1,
        "runtime.coordinator_address": "localhost:1",
        "runtime.compilation_cache": "/other",
        "text.cache_dir": "/other",
    }
    assert facts(CONFIG) == facts(changed(CONFIG, own, "test"))


def test_the_state_of_the_run_directory_is_compared(equal_code, tmp_path):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path / "a"))
    folder = RunDir(config.run_dir)
    name = f"what is in {config.run_dir}"
    states = [facts(config, folder)[name]]
    with folder.create(config, {}, []):
        pass
    states += [facts(config, folder)[name], facts(config)[name]]
    assert states == ["new", "unfinished", "a complete run"]
    folder._lock.release()


def test_code_and_packages_are_compared(tmp_path):
    here = facts(CONFIG)
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "a.py").write_text("edited")
    elsewhere = provenance.shared_parts(tmp_path)
    assert differing(elsewhere, here) >= {"code version"}
    assert elsewhere["package jax"] == here["package jax"] == jax.__version__


def test_every_process_must_see_the_lock_of_the_first(tmp_path, monkeypatch):
    folder = RunDir(tmp_path / "a")
    with folder.create(CONFIG, {}, []):
        pass
    prepare_runs._find(folder, folder.holder)
    monkeypatch.setattr(prepare_runs, "DISK_PATIENCE", 0.0)
    elsewhere = RunDir(tmp_path / "not-shared")
    for mine, seen in ((folder, "process"), (elsewhere, "nobody")):
        with pytest.raises(UserError, match=f"(?s)process 0 .*another.*by .*{seen}"):
            prepare_runs._find(mine, "another machine, process 1")
    folder._lock.release()
