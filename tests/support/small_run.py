"""A tiny run of the real pipeline in the test's own process, on a 2x2x2 mesh."""

import dataclasses
import json
import shutil

import jax
import numpy as np
from tiny_model import make_tiny_model

from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.stored_steps import step_folders
from research.config.run_config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TextConfig,
)
from research.parallel import mesh as meshes
from research.runs.run_directory import COMPLETE, RunDir
from research.tasks import task_registry
from research.train.step import train_step
from research.train.step.definition_from_config import make_step_definition

ROWS = 8  # In a batch, so that it divides over any mesh of eight devices.


def make_small_place(folder):
    """Fills `folder` with `model` and `rows.jsonl`."""
    make_tiny_model(folder / "model")
    rows = [
        {"instruction": f"What is {i} and {i}?", "response": f"It is {2 * i}."}
        for i in range(40)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)


def small_config(place, name, steps, model=None, **changes):
    """Few short rows, no samples."""
    return Config(
        run_dir=str(place / name),
        steps=steps,
        export=True,
        model=ModelConfig(
            init_from=str(place / "model"), dtype="float32", **(model or {})
        ),
        data=DataConfig(
            path=str(place / "rows.jsonl"), seq_len=64, batch_size=4, held_out=4
        ),
        optim=OptimConfig(learning_rate=1e-2),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        eval=EvalConfig(every=100, prompts=0, answers_rows=0),
        checkpoint=CheckpointConfig(every=2),
        runtime=RuntimeConfig(compilation_cache="", peak_tflops=0.05, progress="lines"),
        **{"text": TextConfig(cache_dir=str(place / "tokens")), **changes},
    )


def as_killed(run, step, target):
    """A copy of a finished run, as if it had been killed before the save after `step`.

    Its metrics go further, as after a kill some steps past a save.
    """
    shutil.copytree(run, target)
    (target / COMPLETE).unlink()
    saved = {int(x.name): x for x in step_folders(target / "checkpoints")}
    assert step in saved and max(saved) > step
    for later in saved.keys() - range(step + 1):
        shutil.rmtree(saved[later])
    return target


def small_hidden(model, weights):
    """Hidden states of a fixed batch."""
    tokens = np.tile(np.arange(32, dtype=np.int32), (ROWS, 1))
    return jax.jit(model.hidden)(weights, tokens, tokens, np.ones_like(tokens))


def one_device():
    """A mesh of one device."""
    return meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])


def saved_state(run):
    """The whole training state and its position, read as a resumed run reads them."""
    folder = RunDir(run)
    config = folder.config()
    plain = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention="xla")
    )
    base = task_registry.open_start(config, folder.own_tokenizer)
    devices = one_device()
    objective = task_registry.make_objective(plain, devices)
    definition = make_step_definition(plain, base, devices, objective)
    with Checkpointer(
        folder.checkpoints, config.checkpoint, folder.identity(), read_only=True
    ) as checkpointer:
        return checkpointer.restore(train_step.abstract_state(definition))
