"""Adapters that change below requests, and paths that a client may not have opened."""

import collections
import dataclasses
import json
from pathlib import Path

import httpx
import jax
import numpy as np
import pytest
from live_servers import SLOTS
from waiting import PATIENCE

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
        draw = np.random.default_rng(sum(identity.encode()))
        self._row = shape.unflatten(
            [jax.device_put((0.3 * draw.normal(size=x.shape)).astype(x.dtype))
             for x in leaves]
        )  # fmt: skip
        base = self._runs._reader.opened.served_base
        return dataclasses.replace(
            base, name=address.name, parent="base", address=address, step=step,
            identity=identity,
        )  # fmt: skip

    def row(self, identity):
        return self._row


@pytest.fixture
def fakes(server, monkeypatch):
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
    server, fakes, caplog
):
    assert load(server, "a").status_code == load(server, "b").status_code == 200
    refused = load(server, "c")
    assert refused.status_code == 400 and "room for 2 adapters" in refused.text
    assert "--adapters" in refused.text
    engine = server.deployment.engine
    fakes.steps["a"] = 2
    server.deployment.follow()
    assert engine.names.identities() == {"a": "a 2", "b": "b 1"}
    # While an answer runs with an adapter of before, its row stays.
    before, reads = engine.names.use("a"), fakes.reads
    fakes.steps["a"] = 3
    server.deployment.follow()
    fakes.steps["b"] = 2
    for _ in range(3):
        server.deployment.follow()
    assert (
        engine.names.identities() == {"a": "a 3", "b": "b 1"}
        and fakes.reads == reads + 1
    )
    assert caplog.text.count("b stays at step 1: no row is free") == 1
    engine.names.release(before)
    server.deployment.follow()
    assert engine.names.identities() == {"a": "a 3", "b": "b 2"}


def test_all_answers_of_a_request_have_the_adapter_that_it_began_with(server, fakes):
    """With more answers than slots, the last begin after the adapter has changed."""
    ask = {
        "model": "a", "prompt": "a", "max_tokens": 40, "n": 2 * SLOTS + 1,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    assert load(server, "a").status_code == 200
    alone = server.post("/v1/completions", ask | {"n": 1, "stream": False}).json()
    for change in (
        lambda: load(server, "a", load_inplace=True),
        lambda: server.post("/v1/unload_lora_adapter", {"lora_name": "a"}),
    ):
        texts, marks, events = collections.defaultdict(str), set(), []
        name = server.deployment.models.find("a").served.identity
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=ask, timeout=PATIENCE
        ) as stream:
            for line in filter(None, stream.iter_lines()):
                events.append(line.removeprefix("data: "))
                if len(events) == 1:
                    fakes.steps["a"] = 2
                    assert change().status_code == 200
        assert events[-1] == "[DONE]"
        for event in map(json.loads, events[:-1]):
            assert "error" not in event, event
            marks.add(event["system_fingerprint"])
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert len(texts) == ask["n"] and len({*texts.values()}) == 1
        if name == "a 1":
            assert texts[0] == alone["choices"][0]["text"]
            assert marks == {alone["system_fingerprint"]}
            now = server.post("/v1/completions", ask | {"n": 1, "stream": False}).json()
            assert now["system_fingerprint"] not in marks
            assert now["choices"][0]["text"] != texts[0]
    assert not server.deployment.engine.names.identities()


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
