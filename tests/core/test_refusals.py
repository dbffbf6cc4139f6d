"""Each refusal is one message with the remedy, exit code 2, and writes nothing."""

import json
import re
import shutil

import pytest
import tiny_model
from commands import CONFIG, RANK, STEPS, chain, snapshot
from refusals import Refusal

from research.config.command_line import last_of_each
from research.formats.base_model import open_base


def bad_file(name, text, *names, flags=()):
    path = f"--config.data.path={name}"
    return Refusal((path, *flags), names, files=((name, text),))


GOOD = '{"instruction": "a", "response": "b"}\n'

REFUSALS = {
    "missing data": Refusal(
        ("--config.data.path=absent.jsonl",), ("absent.jsonl", "does not exist")
    ),
    "malformed line": bad_file(
        "torn.jsonl", GOOD + GOOD + '{"instruction":\n', "torn.jsonl:3", "bad_lines"
    ),
    "unknown column": bad_file(
        "columns.jsonl",
        GOOD,
        "columns.response",
        "'anser'",
        "'instruction', 'response'",
        flags=("--config.data.columns.response=anser",),
    ),
    "no usable row": bad_file(
        "none.jsonl", GOOD.replace("b", ""), "none.jsonl", "no usable row"
    ),
    "all too long": Refusal(("--config.data.seq_len=8",), ("config.data.seq_len=8",)),
    "unknown target": Refusal(
        ("--config.lora.targets=('quary',)",),
        ("'quary'", "'query'", "layers.attention.query.kernel", "layers.mlp.up.kernel"),
    ),
    "broken pattern": Refusal(("--config.lora.targets=('mlp(',)",), ("mlp(",)),
    "rank 0": Refusal(("--config.lora.rank=0",), ("config.lora.rank", "0")),
    "an address and nobody to join": Refusal(
        ("--config.runtime.coordinator_address=a:1",), ("config.runtime.distributed",)
    ),
    "negative seed": Refusal(("--config.seed=-1",), ("config.seed", "-1")),
    "mistyped choice": Refusal(
        ("--config.model.dtype=bfloat",), ("config.model.dtype", "'bfloat16'")
    ),
    "mesh for other devices": Refusal(
        ("--config.mesh.data=3",), ("data=3", "8 devices"), devices=8
    ),
    "mesh that cuts heads": Refusal(
        ("--config.mesh.tensor=4",),
        ("kv_heads", "size 2", "tensor=4", "config.mesh.tensor", "1, 2"),
        devices=8,
    ),
    "missing weights": Refusal(
        ("--config.model.init_from=absent",), ("'absent'", "hub://", "pkg://")
    ),
    "weights that do not fit": Refusal(
        ("--config.model.init_from=misfit",),
        ("do not fit", "mlp.gate_proj.weight", "[128, 64]", "[96, 64]"),
        prepare="misfit",
    ),
    "another config": Refusal(("--config.seed=1",), ("seed: 0 -> 1",), prepare="copy"),
    "another base": Refusal((), ("base model:", "run_dir"), prepare="base"),
    "another base's checkpoint": Refusal(
        (), ("checkpoint", "base model:"), prepare="checkpoint"
    ),
    "run_dir under a file": Refusal(
        ("--config.run_dir=config.py/run",), ("config.py/run", "--config.run_dir")
    ),
    "run_dir of something else": Refusal(
        ("--config.run_dir=model",), ("model is a model", "another run directory")
    ),
    "run_dir that is a file": Refusal(
        ("--config.run_dir=config.py",), ("config.py", "--config.run_dir")
    ),
    "no run_dir": Refusal(("--config.run_dir=",), ("config.run_dir",)),
    "mistyped knob": Refusal(
        ("--config.lora.rnak=4",), ("config.lora.rnak", "--config.lora.rank=4?")
    ),
    "wrong type": Refusal(("--config.steps=many",), ("config.steps", "'many'")),
    "wrong type in the config": Refusal(
        ("--config=typed.py",),
        ("rank", "four", "int"),
        files=(("typed.py", CONFIG.replace(f"= {RANK}", "= 'four'")),),
    ),
    "mistyped knob in the config": Refusal(
        ("--config=mistyped.py",),
        ("rnak", "rank"),
        files=(("mistyped.py", CONFIG.replace("lora.rank", "lora.rnak")),),
    ),
    "missing config": Refusal(("--config=absent.py",), ("absent.py",)),
    "no config": Refusal(
        ("--config.steps=3",), ("--config=FILE.py",), command="bare train"
    ),
    "stray argument": Refusal(("steps=3",), ("--config.steps=3",)),
    "talk: no run": Refusal(
        ("--run=runs/absent",), ("runs/absent", "config.json"), command="generate"
    ),
    "talk: no run named": Refusal(("--prompt=x",), ("--run",), command="generate"),
    "talk: unknown step": Refusal(
        ("--step=7", "--prompt=x"), ("'7'", str(STEPS)), prepare="copy",
        command="generate",
    ),
    "talk: another base": Refusal(
        ("--prompt=x",), ("base model:",), prepare="base", command="generate"
    ),
    "talk: too long a prompt": Refusal(
        (f"--prompt={'word ' * 200}",), ("512",), prepare="copy", command="generate"
    ),
    "talk: mistyped flag": Refusal(("--promt=x",), ("promt",), command="generate"),
}  # fmt: skip


# A start of a run that is there records its cause, and nothing else.
EACH_START = ("run.json",)


@chain
def refused(place, results):
    """How each ended, and whether its run directory was as before."""
    results("unbroken")
    make_misfit(place.folder / "model", place.folder / "misfit")
    commands, before = {}, {}
    for name, case in REFUSALS.items():
        there, module, flags = prepare(place, name, case)
        commands[name] = there, module, flags, case.devices
        before[name] = snapshot(there.run_dir(run_of(name)), *EACH_START)
    ended = place.run_short(commands)
    return {
        name: (ended[name], known == snapshot(there.run_dir(run_of(name)), *EACH_START))
        for (name, known), (there, *_) in zip(
            before.items(), commands.values(), strict=True
        )
    }


def run_of(name):
    return name.replace(" ", "-").replace(":", "").replace("'", "")


def prepare(place, name, case):
    """Makes what has to be there; returns where to run which module with what flags."""
    run = run_of(name)
    for file, text in case.files:
        (place.folder / file).write_text(text)
    if case.prepare in ("copy", "base", "checkpoint"):
        shutil.copytree(place.run_dir("unbroken"), place.run_dir(run))
        (place.run_dir(run) / "complete.json").unlink()
    if case.prepare in ("base", "checkpoint"):
        place = change_base(place, run, everywhere=case.prepare == "checkpoint")
    if case.command == "train":
        return place, "train", last_of_each([*place.train_flags(run), *case.flags])
    known = [f"--run=runs/{run}"] if case.prepare else []
    return place, case.command.removeprefix("bare "), (*known, *case.flags)


def make_misfit(model, copy):
    shutil.copytree(model, copy)
    config = tiny_model.CONFIG | {"intermediate_size": 96}
    (copy / "config.json").write_text(json.dumps(config))


def change_base(place, run, everywhere):
    """The run moved to where `model` is another; `everywhere`: its papers say so."""
    moved = place.beside(f"moved-{run}")
    tiny_model.make_tiny_model(moved.folder / "model", seed=1)
    shutil.copy(place.folder / "config.py", moved.folder)
    shutil.move(place.run_dir(run), moved.run_dir(run))
    config = moved.run_dir(run) / "config.json"
    began = json.loads(config.read_text()) | {"folder": str(moved.folder)}
    config.write_text(json.dumps(began))  # Its base is the model of this place.
    if everywhere:
        identity = moved.run_dir(run) / "identity.json"
        now = open_base(str(moved.folder / "model")).fingerprint
        said = json.loads(identity.read_text())
        identity.write_text(json.dumps(said | {"base model": now}, indent=2))
    return moved


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_one_message_and_nothing_written(name, refused):
    finished, untouched = refused[name]
    said = finished.err
    assert finished.code == 2, said
    assert "Traceback" not in said
    assert len(re.findall("^error: ", said, re.M)) == 1, said
    message = said.partition("error: ")[2]
    for part in REFUSALS[name].names:
        assert part in message
    assert untouched
