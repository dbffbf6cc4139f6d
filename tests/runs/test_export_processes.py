"""The export command in several processes, each of which holds a part of the model."""

import json
import signal

import numpy as np
import pytest
from doors import run_door
from free_ports import free_port
from safetensors.numpy import load_file

from research.config.choices import EXPORT_FORMATS
from research.export import __main__ as export_door
from research.export import write_model
from research.formats.export_names import ORIGIN, PARITY
from research.parallel import joined_processes, runtime

ALL = ",".join(EXPORT_FORMATS)


def start(place, *flags, programs=("", "")):
    """The command in two processes of two devices each, running."""
    address = f"localhost:{free_port()}"
    return [
        place.start(
            "export", "--distributed", *flags,
            program=program, forked=False, devices=2,
            more={
                "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(rank),
            },
        )
        for rank, program in enumerate(programs)
    ]  # fmt: skip


def names(folder):
    return sorted(x.name for x in folder.iterdir()) if folder.exists() else []


@pytest.mark.soak
def test_two_processes_write_what_one_does(place, unbroken):
    assert unbroken.code == 0, unbroken.err
    flags = ("--run=runs/unbroken", f"--format={ALL}")
    ended = [x.finish() for x in start(place, *flags, "--out=pair")]
    ended.append(place.run("export", *flags, "--out=alone"))
    for each in ended:
        assert each.code == 0, each.err[-3000:]
    assert "export: pair/hf" in ended[0].err and "export:" not in ended[1].err
    pair, alone = place.folder / "pair", place.folder / "alone"
    for name in EXPORT_FORMATS:
        facts = [json.loads((x / name / ORIGIN).read_text()) for x in (pair, alone)]
        assert facts[0]["step"] == facts[1]["step"] == 16
        parity = json.loads((pair / name / PARITY).read_text())
        assert parity["agreement"] == 1
    found, expected = (load_file(x / "hf" / "model.safetensors") for x in (pair, alone))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    again = [x.finish() for x in start(place, *flags, "--out=pair")]
    assert [x.code for x in again] == [0, 0]
    assert again[0].err.count("nothing is written") == len(EXPORT_FORMATS)


DIES = """
import os
from research.formats.huggingface import huggingface_export as module
fetch, module.seen = module.fetch, 0
def dies(*arguments):
    module.seen += 1
    if module.seen == 4:
        os.kill(os.getpid(), {number})
    return fetch(*arguments)
module.fetch = dies
"""


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_process_that_dies_leaves_no_export(place, unbroken, rank, name):
    assert unbroken.code == 0, unbroken.err
    out, programs = place.folder / f"{name}-{rank}" / "out", ["", ""]
    programs[rank] = DIES.format(number=int(signal.Signals[name]))
    flags = ("--run=runs/unbroken", f"--out={out}")
    ended = [x.finish() for x in start(place, *flags, programs=programs)]
    assert all(x.code for x in ended), [x.err[-1000:] for x in ended]
    assert not [x for x in names(out.parent) if not x.startswith(".")]
    assert place.run("export", *flags).code == 0
    assert names(out.parent) == ["out"]


def test_other_processes_are_joined_before_anything_is_read(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(
        joined_processes, "join", lambda flags: called.append(flags.out) or True
    )
    monkeypatch.setattr(
        joined_processes, "or_abandon", lambda work: called.append("together") or work()
    )
    monkeypatch.setattr(runtime, "start_alone", lambda: called.append("alone"))
    monkeypatch.setattr(write_model, "write_model", lambda *x: called.append(x[5]))
    flags = ("export", "--run=runs/x", "--format=hf,gguf", "--out=y")
    for more in (("--distributed",), ()):
        ended = run_door(export_door.main, tmp_path, *flags, *more)
        assert ended.returncode == 0, ended.stderr
    assert called == ["y", "together", ["hf", "gguf"], "alone", ["hf", "gguf"]]
