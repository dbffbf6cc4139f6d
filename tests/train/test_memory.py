"""The start, evaluation, samples and the report need no more memory than a step."""

import json
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ENVIRONMENT, ROOT
from step_definitions import ONE, make_definition, spread

from research.config.run_config import Config
from research.engine.requests import Piece, Request, Sampling
from research.engine.text_generation import SlotDecoders, tuned_generator
from research.tasks.model_answers import HeldOutPrompt
from research.tokenize.conversation import Record, Turn
from research.tokenize.tokenizer_training import byte_tokenizer
from research.train import finish_run
from research.train.metrics.held_out_answers import HeldOutAnswers
from research.train.step import train_step
from research.weights import parameter_paths


def test_the_first_state_takes_the_place_of_the_parameters(model, params):
    definition, _ = make_definition(model, "full", ONE)
    start = spread(params, model.specs, definition.mesh)
    state = train_step.jit_init(definition)(start)
    assert all(x.is_deleted() for x in start.values())
    assert parameter_paths.count(state.params) == parameter_paths.count(params)


def test_samples_use_the_parameters_themselves(model, params):
    """In a run that trains float32 parameters and computes in bfloat16."""
    definition, _ = make_definition(model, "full", ONE, "bfloat16")
    decoders = SlotDecoders(definition.model, definition.mesh)
    split = definition.trainable
    found = tuned_generator(decoders, split, params, {}, None).params
    assert found.keys() == params.keys()
    assert all(found[path] is params[path] for path in params)


class Parrot:
    """A generator that answers every prompt with nothing."""

    def in_order(self, requests):
        for _ in requests:
            yield [Piece(finish="stop")]


def held_out_answers():
    turns = Turn("user", "Hi"), Turn("assistant", "Ho")
    record = Record(turns, "", "open_qa", "rows:1")
    prompt = HeldOutPrompt(record, "Hi", Request((1, 2), Sampling(max_new_tokens=3)))
    task = SimpleNamespace(
        asked=lambda: [prompt], not_asked=lambda: [], groups=["open_qa"]
    )
    return HeldOutAnswers(task, byte_tokenizer(), Config())


def test_the_report_holds_one_model_at_a_time(monkeypatch):
    """The trained parameters and their moments are gone when the base is loaded."""
    state = train_step.TrainState(0, {"w": np.ones(3)}, {"w": np.ones(3)})
    alive = [weakref.ref(state.params["w"]), weakref.ref(state.opt_state["w"])]
    run = SimpleNamespace(
        folder=SimpleNamespace(path=None), definition=SimpleNamespace(mesh=None),
        config=SimpleNamespace(export=False, steps=0), state=state, answered=None,
        answers=held_out_answers(), decoders=None, base=None, frozen=None,
        shares_programs=False,
    )  # fmt: skip
    del state

    def trained(run):
        parrot = Parrot()
        parrot.params = run.state.params
        alive.append(weakref.ref(parrot))
        return parrot

    def load(*arguments):
        assert [x() for x in alive] == [None] * 3
        raise KeyboardInterrupt("seen")

    monkeypatch.setattr(finish_run, "_trained", trained)
    monkeypatch.setattr(finish_run, "base_generator", load)
    with pytest.raises(KeyboardInterrupt, match="seen"):
        finish_run._finish(run, 4)


def test_a_long_prompt_forms_no_square_of_its_length(model):
    """Neither `[T, S]` logits of one head, nor those of all."""
    length, slots = 1024, 2048
    params = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
        for path, spec in model.specs.items()
    }
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    cache = jax.eval_shape(lambda: model.init_cache(1, slots))
    text = jax.jit(model.decode).lower(params, tokens, cache).as_text()
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    sizes = {tuple(map(int, dims.split("x")[:-1])) for dims in found}
    assert (1, length, model.architecture.embed) in sizes, "this test can see arrays"
    assert not [x for x in sizes if x.count(length) + x.count(slots) > 1]


PROGRAM = """
import collections, json, sys
from pathlib import Path
import tiny_model
from small_run import make_small_place, small_config
from research.config.run_config import EvalConfig, MeshConfig
from research.runs import phase_timer
from research.train import start_to_report

place, peaks, last = Path(sys.argv[1]), collections.Counter(), []
tiny_model.CONFIG |= {"hidden_size": 1024, "intermediate_size": 3072}
tiny_model.CONFIG |= {"num_hidden_layers": 8, "num_attention_heads": 16}
make_small_place(place)
enter = phase_timer.PhaseTimer.enter


def measured(timer, name):
    # The peak since it was last set back (proc(5), clear_refs).
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peaks[timer.name] = max(peaks[timer.name], peak)
    Path("/proc/self/clear_refs").write_text("5")
    last[:] = [timer]
    enter(timer, name)


phase_timer.PhaseTimer.enter = measured
import dataclasses
config = small_config(place, "run", 4, trainable="full")
config = dataclasses.replace(
    config,
    mesh=MeshConfig(),
    model=dataclasses.replace(config.model, dtype="bfloat16"),
    eval=EvalConfig(every=2, prompts=2, max_new_tokens=4, samples_every=2),
)
Path("/proc/self/clear_refs").write_text("5")
assert start_to_report.train([config]) == 0
measured(*last, "finish")
print(json.dumps(peaks))
"""


@pytest.mark.soak
def test_the_peak_of_every_phase_is_below_that_of_a_step(tmp_path):
    """Full training of 94 M parameters on one device; `save` copies on a CPU."""
    support = str(ROOT / "tests" / "support")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**ENVIRONMENT, "PYTHONPATH": f"{support}:{ROOT}"}
        | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = json.loads(done.stdout.splitlines()[-1])
    print({phase: f"{peak / 1e9:.2f} GB" for phase, peak in peaks.items()})
    for phase in ("start", "evaluate", "sample", "finish"):
        assert 0 < peaks[phase] <= peaks["step"], phase
