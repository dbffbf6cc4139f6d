"""Two processes of two devices each train as one of one device does.

They stop once in between: see `process_pairs.py`.
"""

import jax
import numpy as np
import pytest
from helpers import close
from pretraining_runs import PRETRAIN_STEPS as STEPS
from run_results import saved_state


def test_two_processes_train_the_same_steps_on_the_same_data(
    place, pretrained, two_processes
):
    assert pretrained.code == 0, pretrained.err
    assert two_processes.launched.code == 0, two_processes.launched.err
    alone, together = (
        place.lines(run, "train") for run in ("pretrained", "two-processes")
    )
    assert len(alone) == len(together) == STEPS
    for one, two in zip(alone, together, strict=True):
        assert one["batch_hash"] == two["batch_hash"]
        assert one["tokens"] == two["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    held = [place.lines(run, "eval")[-1] for run in ("pretrained", "two-processes")]
    assert held[1]["loss"] == pytest.approx(held[0]["loss"], rel=1e-5)


def test_two_processes_end_with_the_same_parameters_and_moments(
    place, pretrained, two_processes
):
    alone, together = (
        saved_state(place, run) for run in ("pretrained", "two-processes")
    )
    assert jax.tree.structure(alone) == jax.tree.structure(together)
    assert len(jax.tree.leaves(alone)) > 20
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(alone))
    # By norms: Adam turns rounding in one gradient near zero into a full-size update.
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        assert np.linalg.norm(two - one) <= 1e-3 * np.linalg.norm(one)
    close(together, alone, rtol=0.1)


def test_hashes_of_different_batches_differ(place, pretrained):
    hashes = [line["batch_hash"] for line in place.lines("pretrained", "train")]
    assert len(set(hashes)) == STEPS


def test_only_the_first_process_speaks(two_processes):
    assert two_processes.launched.err.count(f"step {STEPS}  held-out loss") == 1
