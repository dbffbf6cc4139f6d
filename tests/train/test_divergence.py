"""A loss that is not finite stops a run, or returns it to before the batch that did it.

The base model has one embedding that is infinite, and one row of the data its token.
"""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from commands import STEPS, chain
from kills import SLOW_DATA
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from research.core.errors import PREEMPTED, DivergedError
from research.data.grouped_values import by_group

pytestmark = pytest.mark.soak

FLAGS = (
    "--config=config.py",
    "--config.data.path=poisoned.jsonl",
    "--config.data.seq_len=128",
    "--config.data.batch_size=2",
    "--config.data.microbatch_size=2",
    "--config.data.held_out=4",
    "--config.eval.prompts=1",
    "--config.eval.every=100",
    "--config.checkpoint.every=2",
)


@chain
def poisoned(place, results):
    """A model whose embedding of `~` is infinite, and rows, one of which holds it."""
    shutil.copytree(place.folder / "model", place.folder / "poisoned")
    file = place.folder / "poisoned" / "model.safetensors"
    tensors = {name: np.array(x) for name, x in load_file(file).items()}
    tokenizer = Tokenizer.from_file(str(place.folder / "model" / "tokenizer.json"))
    tensors["model.embed_tokens.weight"][tokenizer.encode("~").ids] = np.inf
    save_file(tensors, file)
    with (place.folder / "poisoned.jsonl").open("w") as out:
        for n in range(60):
            row = {"instruction": f"Count to {n}.", "response": f"{n} words. " * 6}
            if n == 33:
                row["response"] = "A wave ~ here."
            print(json.dumps(row), file=out)


@chain
def diverged(place, results):
    """Stopped by the row; allowed to leave its batch out, stopped again, to the end."""
    results("poisoned")
    flags = (*FLAGS, "--config.model.init_from=poisoned")
    where = "--config.run_dir=runs/diverged"
    stopped = place.run("train", *flags, where, "--config.runtime.grad_norms=True")
    kept = place.saved_steps("diverged"), place.lines("diverged", "train")
    allowed = (*flags, where, "--config.optim.rollbacks=1")
    rolled = place.start("train", *allowed, program=SLOW_DATA)
    rolled.wait_for(rf"step +{kept[1][-1]['step'] + 1}/")
    rolled.send(signal.SIGTERM)
    return stopped, *kept, rolled.finish(), place.run("train", *allowed)


@chain
def clean(place, results):
    results("poisoned")
    return place.run("train", *FLAGS, "--config.run_dir=runs/clean")


@pytest.fixture
def bad_step(diverged):
    return diverged[2][-1]["step"]


def test_a_loss_that_is_not_finite_stops_with_what_it_came_of(diverged, bad_step):
    stopped, saved, lines = diverged[:3]
    assert stopped.code == DivergedError.exit_code, stopped.err
    last = stopped.err.splitlines()[-1]
    assert last.startswith(f"error: step {bad_step} gave loss nan")
    assert f"batch {bad_step - 1}, batch_hash {lines[-1]['batch_hash']}" in last
    assert "gradients not finite: layers." in last
    assert "Traceback" not in stopped.err
    # It is written down, and nothing of it is saved.
    assert "loss" not in lines[-1] and lines[-1]["not_finite/loss"] == "NaN"
    assert all(np.isfinite(line["loss"]) for line in lines[:-1])
    assert saved and max(saved) < bad_step


def test_norms_of_every_parameter_are_written_on_request(diverged):
    first = diverged[2][0]
    norms = by_group(first, "grad_norm")
    assert len(norms) == 14, "two factors of seven matrices"
    total = np.sqrt(sum(x**2 for x in norms.values()))
    assert total == pytest.approx(first["grad_norm"], rel=1e-5)


def test_a_rollback_leaves_the_batch_out_and_goes_on(place, diverged, bad_step, clean):
    rolled, last = diverged[3:]
    assert rolled.code == PREEMPTED and "rollback 1 of" in rolled.err, rolled.err
    (reached,) = map(int, re.findall(r"stopped after step (\d+)", rolled.err))
    assert bad_step < reached < STEPS
    assert last.code == 0, last.err
    assert f"step {reached} restored" in last.err and "rollback" not in last.err
    found = json.loads((place.run_dir("diverged") / "run.json").read_text())
    assert found["skipped_batches"] == [bad_step - 1]
    assert any("rollback 1 of" in event["what"] for event in found["events"])
    assert "DivergedError" in found["starts"][0]["cause"]
    lines = place.lines("diverged", "train")
    assert [x["step"] for x in lines] == [*range(1, STEPS + 1)]
    assert all(np.isfinite(x["loss"]) for x in lines)
    # The batches of a run that never met it, without that one.
    assert clean.code == 0, clean.err
    expected = place.lines("clean", "train")
    hashes = [x["batch_hash"] for x in expected]
    del hashes[bad_step - 1]
    assert [x["batch_hash"] for x in lines][: STEPS - 1] == hashes
    # And its steps, up to there.
    assert bad_step > 2
    for one, other in zip(lines[: bad_step - 1], expected, strict=False):
        assert one["loss"] == other["loss"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
