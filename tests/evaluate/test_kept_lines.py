"""Kept answers are reused by the same code on the same devices alone."""

import dataclasses
import types

import pytest

from research.config.run_config import Config
from research.core.errors import UserError
from research.evaluate import run_evaluation
from research.evaluate.__main__ import main
from research.evaluate.measuring import evaluated_models, measure_models
from research.runs import provenance


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str = "cpu"
    device_kind: str = "cpu"


def write_code(root, text):
    (root / "research").mkdir(exist_ok=True)
    (root / "research" / "engine.py").write_text(text)


@pytest.mark.parametrize("changed", ["code", "jax", "environment", "backend"])
def test_answers_of_another_version_are_not_reused(tmp_path, monkeypatch, changed):
    write_code(tmp_path, "x = 1")
    parts = provenance.shared_parts
    monkeypatch.setattr(measure_models, "shared_parts", lambda: parts(tmp_path))
    folder = tmp_path / "evaluations"

    def kept():
        measure_models.ask_kept("answers", {}, [], folder, 4, dict)
        return {x.name for x in (folder / "kept").iterdir()}

    [first] = kept()
    assert kept() == {first}, "the same command finds its own answers"
    if changed == "code":
        write_code(tmp_path, "x = 2")
    elif changed == "jax":
        version = provenance._version
        newer = lambda name: "99.0" if name == "jax" else version(name)  # noqa: E731
        monkeypatch.setattr(provenance, "_version", newer)
    elif changed == "environment":
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    else:
        gpu = [Device("gpu", "H100")]
        monkeypatch.setattr(measure_models.jax, "local_devices", lambda: gpu)
    assert len(kept()) == 2


def test_a_second_equal_command_is_refused_before_it_measures(tmp_path, monkeypatch):
    folder = types.SimpleNamespace(path=tmp_path)
    run = types.SimpleNamespace(config=Config(), folder=folder)
    one = types.SimpleNamespace(name="tuned", identity="5f", run=run)
    found = types.SimpleNamespace(models=[one], target=one)
    monkeypatch.setattr(evaluated_models, "find_models", lambda *_: found)
    started = []

    def evaluate(*_):
        started.append(1)
        with pytest.raises(UserError, match="by another evaluation: wait for it"):
            main(["evaluate", "--run=a", "--rows=3"])
        if len(started) == 1:
            main(["evaluate", "--run=a", "--rows=4"])
        raise KeyboardInterrupt

    monkeypatch.setattr(run_evaluation, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        main(["evaluate", "--run=a", "--rows=3"])
    assert len(started) == 2, "another command of the same run may work beside it"
