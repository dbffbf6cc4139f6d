"""An earlier version wrote a checkpoint that must restore for ever, and its losses.

The first losses of a run are compared each time, those of 100 steps, to the last digit,
in `make soak`.

`RECORD_KEPT=1 make test FLAGS="-m 'not tpu' tests/checkpoints/test_kept.py"` writes the
checkpoint and the losses again. Do that only when the numbers are meant to change, and
say why. `make orbax-oldest` restores the checkpoint with the oldest Orbax that
requirements.txt allows.
"""

import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import CHAINS
from small_states import IDENTITY, KEEP, POSITION, abstract, equal, make_state

from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.checksums import find_damage
from research.config.field_names import flag
from research.config.knobs import flat
from research.config.run_config import Config

KEPT = Path(__file__).parents[1] / "golden" / "kept"
LOSSES = KEPT / "losses.json"
RECORD = bool(os.environ.get("RECORD_KEPT"))
# XLA's CPU compiler and its matrix products choose their code by these.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


def test_a_checkpoint_of_an_earlier_version_restores():
    if RECORD:
        with Checkpointer(KEPT / "checkpoints", KEEP, IDENTITY) as checkpointer:
            checkpointer.save(1, make_state(1), POSITION, 2.5)
    assert find_damage(KEPT / "checkpoints" / "1") == []
    with Checkpointer(
        KEPT / "checkpoints", KEEP, IDENTITY, read_only=True
    ) as checkpointer:
        found = checkpointer.restore(abstract(make_state(0)))
        assert checkpointer.best_step == 1
    assert found.step == 1 and found.position == POSITION
    assert equal(found.state, make_state(1))


def machine():
    """JAX, and what of the processor decides how it rounds."""
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text().split()) if file.exists() else set()
    return " ".join([jax.__version__, *(x for x in FEATURES if x in flags)])


SMALL = (
    "--config.steps=100",
    "--config.eval.every=1000",
    "--config.data.batch_size=2",
    "--config.data.microbatch_size=1",
)
JOBS = {
    "lora": ("--config.data.held_out=16", "--config.eval.prompts=1"),
    "full": (
        "--config.data.held_out=16",
        "--config.eval.prompts=1",
        "--config.trainable=full",
        "--config.optim.name=lion",
        "--config.optim.learning_rate=1e-3",
        "--config.lora.dropout=0.0",
        "--config.lora.rank=16",
    ),
    "text": (
        "--config.data.kind=text",
        "--config.text.sources=('words=kept.jsonl',)",
        "--config.text.cache_dir=kept-tokens",
        "--config.text.held_out_share=0.1",
        "--config.data.seq_len=64",
        "--config.trainable=full",
        "--config.optim.schedule=wsd",
        # These undo `config.py`, which is for rows and adapters.
        *(
            flag(path, flat(Config())[path])
            for path in (
                *("lora.rank", "lora.dropout", "eval.answers_rows"),
                *("data.overlength", "data.held_out", "data.edition"),
            )
        ),
    ),
}


def train_kept(place, results, name):
    """Trains 100 steps and returns their losses."""
    rows = [{"text": f"{n} times {n} is {n * n}; " * 4} for n in range(300)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place.folder / "kept.jsonl").write_text(text)
    # The kept losses come from fully optimized programs, as users run them.
    done = place.train(f"kept-{name}", *SMALL, *JOBS[name], quick=False)
    assert done.code == 0, done.err
    return losses_of(place, f"kept-{name}")


def losses_of(place, run):
    return [x["loss"] for x in place.lines(run, "train")]


def record(name, found):
    known = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
    here = known.get(machine(), {}) | {name: found}
    LOSSES.write_text(json.dumps(known | {machine(): here}, indent=0))


# Not in the background: only where a test that needs them is chosen.
CHAINS["kept"] = {
    f"kept-{name}": functools.partial(train_kept, name=name) for name in JOBS
}


def test_the_first_losses_are_those_of_an_earlier_version(place, unbroken):
    """On any processor: so early, roundings have not grown."""
    found = losses_of(place, "unbroken")[:10]
    if RECORD:
        record("unbroken", found)
    recorded = [
        known["unbroken"]
        for known in json.loads(LOSSES.read_text()).values()
        if "unbroken" in known
    ]
    assert recorded
    for expected in recorded:
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def check_losses(found, name, pytestconfig):
    """Digit by digit where this JAX was recorded on such a processor.

    Elsewhere other roundings grow with the steps: the first losses are close, and the
    end is as low.
    """
    if RECORD:
        record(name, found)
    known = json.loads(LOSSES.read_text())
    assert len(found) == 100 and np.mean(found[-10:]) < 0.9 * found[0]
    if name in known.get(machine(), {}):
        assert found == known[machine()][name]
        return
    terminal = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    terminal.write_line(
        f"\n{name}: no exact losses are recorded for {machine()!r}, so only close ones "
        "are expected; record them with RECORD_KEPT=1",
        yellow=True,
    )
    for other in (x for x in known.values() if name in x):
        np.testing.assert_allclose(found[:5], other[name][:5], rtol=1e-3)
        np.testing.assert_allclose(
            np.mean(found[-20:]), np.mean(other[name][-20:]), rtol=0.05
        )


@pytest.mark.soak
@pytest.mark.parametrize("name", JOBS)
def test_100_steps_give_the_same_losses(results, name, pytestconfig):
    check_losses(results(f"kept-{name}"), name, pytestconfig)
