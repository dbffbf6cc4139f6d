"""Adapters that change below requests, and paths that a client may not have opened."""

import dataclasses
from pathlib import Path

import jax
import pytest

from research.runs.answering.run_addresses import RunAddress
from research.weights.adapters import serving_bank


class FakeRuns:
    """Adapters without a run: each has random factors that only its name decides.

    Attributes:
      reads: how often one was read.
      steps: the newest step by name.
    """

    def __init__(self, served_runs):
        self._runs, self.reads, self.steps = served_runs, 0, {}
        self._row = None

    def read(self, kind, address):
        self.reads += 1
        step = self.steps.setdefault(address.name, 1)
        identity = f"{address.name} {step}"
        params = self._runs._engine._decoder.params
        row = serving_bank.bank_row(params, {})
        leaves, shape = jax.tree.flatten(row)
        key = jax.random.key(sum(identity.encode()))
        self._row = shape.unflatten(
            [jax.random.normal(key, x.shape, x.dtype) for x in leaves]
        )
        base = self._runs._reader.opened.served_base
        return dataclasses.replace(
            base, name=address.name, parent="base", address=address, step=step,
            identity=identity,
        )  # fmt: skip

    def row(self, identity):
        return self._row


@pytest.fixture
def fake(server, monkeypatch):
    """Adapters for the runs of the server, which has none afterwards."""
    served_runs = server.deployment.load.__self__
    found = FakeRuns(served_runs)
    monkeypatch.setattr(served_runs, "_read", found.read)
    monkeypatch.setattr(served_runs._reader, "row", found.row)
    monkeypatch.setattr(
        served_runs, "_address", lambda path: RunAddress("", Path(path), "latest")
    )
    monkeypatch.setattr(
        "research.runs.answering.open_for_answering.ServedModel.has_changed",
        lambda self: bool(self.address) and found.steps[self.name] != self.step,
    )
    yield found
    for name in [x.name for x in server.deployment.models.all() if x.adapter]:
        server.deployment.unload(name)


def load(server, name, path="x", **more):
    body = {"lora_name": name, "lora_path": str(path), **more}
    return server.post("/v1/load_lora_adapter", body)


def test_a_full_bank_follows_its_runs_and_reads_nothing_that_has_no_row(
    server, fake, caplog
):
    assert load(server, "a").status_code == load(server, "b").status_code == 200
    refused = load(server, "c")
    assert refused.status_code == 400 and "room for 2 adapters" in refused.text
    assert "--adapters" in refused.text
    engine = server.deployment.engine
    fake.steps["a"] = 2
    server.deployment.follow()
    assert engine.names.identities() == {"a": "a 2", "b": "b 1"}
    # While an answer runs with an adapter of before, its row stays.
    before, reads = engine.names.use("a"), fake.reads
    fake.steps["a"] = 3
    server.deployment.follow()
    fake.steps["b"] = 2
    for _ in range(3):
        server.deployment.follow()
    assert (
        engine.names.identities() == {"a": "a 3", "b": "b 1"}
        and fake.reads == reads + 1
    )
    assert caplog.text.count("b stays at step 1: no row is free") == 1
    engine.names.release(before)
    server.deployment.follow()
    assert engine.names.identities() == {"a": "a 3", "b": "b 2"}


def test_a_path_runs_no_code_and_leads_nowhere_else(server, tmp_path, monkeypatch):
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    (outside / "checkpoints" / "1").mkdir(parents=True)
    for file in ("config.json", "identity.json"):
        (outside / file).write_text("{}")
    (runs / "group").mkdir(parents=True)
    (runs / "group" / "link").symlink_to(outside)
    marker = tmp_path / "marker"
    (runs / "x.py").write_text(f"open({str(marker)!r}, 'w')")
    served_runs = server.deployment.load.__self__
    monkeypatch.setattr(served_runs, "_roots", [runs.resolve()])
    for path, status in (
        (runs / "x.py", 404), (f"{runs}/x.py:word", 404), (f"{runs}/x.py@3", 404),
        (outside, 403), (runs / "group" / "link", 403), (runs / "group", 403),
        (f"{runs}/group@latest", 403), (f"{runs}/\0", 403),
    ):  # fmt: skip
        found = load(server, "refused", path)
        assert found.status_code == status, (path, found.text)
    assert not marker.exists()
