"""The log of a run ends it where its numbers are not finite, or nothing is learnt."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from research.config.run_config import Config, OptimConfig, RuntimeConfig
from research.core.errors import DivergedError
from research.data.metric_sums import Ratio
from research.evaluate.held_out_losses import Evaluation
from research.runs.metrics_file import append_line, read_metrics
from research.runs.phase_timer import PhaseTimer
from research.train.metrics import metrics_log, throughput
from research.train.metrics.metrics_log import StepLog

NAN = math.nan


def open_log(folder, first=0, **optim):
    config = Config(
        steps=200,
        optim=OptimConfig(**optim),
        runtime=RuntimeConfig(peak_tflops=1.0, progress="lines"),
    )
    clock, flops = throughput.Clock(), throughput.FlopCount(1.0, 1.0, 1.0)
    console, phases = Console(quiet=True), PhaseTimer()
    return StepLog(config, folder, console, clock, flops, ["all"], first, phases)


def metrics(loss=2.0, norm=1.0, param_norm=3.0, skipped=None):
    found = {"grad_norm": norm, "param_norm": param_norm}
    found |= dict.fromkeys(("tokens", "weight", "pairs"), 8)
    found = {name: jnp.float32(value) for name, value in found.items()}
    found["means"] = {"loss": jnp.float32(loss)}
    found["sums"] = {"loss": Ratio(jnp.float32([8 * loss]), jnp.float32([8.0]))}
    found["batch_hash"] = jnp.uint32(77)
    if skipped is not None:
        found["skipped"] = jnp.int32(skipped)
    return found


@pytest.mark.parametrize("guard", [0.0, 6.0], ids=["plain", "skip_spread"])
@pytest.mark.parametrize("norm", [NAN, math.inf], ids=str)
def test_an_update_that_ruins_the_parameters_ends_the_run(tmp_path, norm, guard):
    """Its own loss and gradient norm are fine."""
    log = open_log(tmp_path, skip_spread=guard)
    with pytest.raises(DivergedError, match=r"parameters after step 5 .*batch 4") as e:
        log(5, 4, metrics(param_norm=norm, skipped=0 if guard else None))
    assert (e.value.step, e.value.batch) == (5, 4)
    log.close()


@pytest.mark.parametrize(
    "loss, window, allowed", [(NAN, 128, 8), (9.0, 128, 32), (9.0, 4, 8)], ids=str
)
def test_updates_that_are_all_skipped_end_the_run(tmp_path, loss, window, allowed):
    log = open_log(tmp_path, skip_spread=6.0, skip_window=window)
    log(1, 0, metrics(skipped=0))
    log(2, 1, metrics(loss=loss, skipped=1))
    log(3, 2, metrics(skipped=1))
    for n in range(1, allowed):
        log(3 + n, 2 + n, metrics(loss=loss, skipped=1 + n))
    with pytest.raises(DivergedError, match=f"last {allowed} updates .* skipped") as e:
        log(3 + allowed, 2 + allowed, metrics(loss=loss, skipped=1 + allowed))
    assert e.value.batch is None, "no single batch is to blame: nothing rolls back"
    log.close()


def test_what_was_skipped_before_a_resume_does_not_count(tmp_path):
    log = open_log(tmp_path, first=50, skip_spread=6.0)
    log(51, 50, metrics(skipped=40))
    log(52, 51, metrics(loss=NAN, skipped=41))
    log.close()


@pytest.mark.parametrize("step, batch", [(0, None), (6, 5)])
def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path, step, batch):
    log = open_log(tmp_path)
    with pytest.raises(DivergedError, match=f"held-out loss after step {step}") as e:
        log.evaluation(step, Evaluation(NAN, {}, {}), batch, "")
    assert (e.value.step, e.value.batch) == (step, batch)
    log.close()
    assert np.isnan(read_metrics(tmp_path)[0]["loss"])


def test_another_process_than_the_first_logs_and_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_log.jax, "process_index", lambda: 1)
    log = open_log(tmp_path)
    log(1, 0, metrics())
    log.close()
    assert not list(tmp_path.iterdir())


def refuse(name):
    raise ValueError(f"{name} is not JSON")


def test_every_line_of_metrics_is_json(tmp_path):
    """Also with numbers that JSON does not have; they are read back as numbers."""
    old = '{"step": 1, "kind": "old", "loss": NaN, "norm": -Infinity}\n'
    (tmp_path / "metrics.jsonl").write_text(old)
    log = open_log(tmp_path, first=1, skip_spread=6.0)
    log(2, 1, metrics(loss=math.inf, norm=NAN, skipped=1))
    log.close()
    append_line(tmp_path, 2, "own", {"loss/a": -math.inf, "loss/NaN": 1.0})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    first, second, third = read_metrics(tmp_path)
    assert np.isnan(first["loss"]) and first["norm"] == -math.inf
    assert second["loss"] == second["loss/all"] == math.inf
    assert np.isnan(second["grad_norm"])
    assert third["loss/a"] == -math.inf and third["loss/NaN"] == 1.0
