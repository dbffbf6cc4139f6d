"""TensorBoard is a copy of the metrics: a disk that refuses it costs only the copy."""

import json
import logging
import threading

import pytest
from run_results import tensorboard_events

from research.config.run_config import Config, hyperparameters
from research.runs import tensorboard_file
from research.runs.metrics_file import MetricsFile


def full_disk(metrics):
    """The next bytes of the event file meet a full disk."""
    records = metrics._board._file
    records._writer.close()
    records._writer = open("/dev/full", "wb")  # noqa: SIM115


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_full_disk_drops_tensorboard_with_a_warning(
    tmp_path, when, caplog, monkeypatch
):
    caplog.set_level(logging.WARNING)
    threads = set(threading.enumerate())
    if when == "open":
        (tmp_path / "tensorboard").write_text("no folder")
    metrics = MetricsFile(tmp_path, 0)
    new = set(threading.enumerate()) - threads
    # A timer may be that of an earlier test.
    new = [thread for thread in new if not isinstance(thread, threading.Timer)]
    assert not new, "a thread of its own can die"
    metrics.write(1, "train", {"loss": 2.0})
    if when == "write":
        full_disk(metrics)
        monkeypatch.setattr(tensorboard_file, "FLUSH_EVERY", 0.0)
    for step in range(2, 40):  # Far more than a queue held.
        metrics.write(step, "train", {"loss": 2.0, "loss/a": 1.0, "loss/b": 2.0})
    if when == "close":
        full_disk(metrics)
        metrics.write(40, "train", {"loss": 2.0})
    metrics.close()
    assert caplog.text.count("TensorBoard gets no more points") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [
        *range(1, 40 + (when == "close"))
    ]


def test_every_group_has_a_tag_of_its_own(tmp_path):
    values = {"loss/a b": 1.0, "loss/a_b": 2.0, "loss/é(x)": float("inf"), "loss/": 4.0}
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(1, "eval", {"loss_unit": "nats", "mfu": None, **values})
    metrics.close()
    found = {
        value.tag: value.simple_value
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    }
    assert found == {f"eval/{name}": value for name, value in values.items()}


def test_a_run_has_its_hyperparameters_in_tensorboard(tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    settings = hyperparameters(Config())
    MetricsFile(tmp_path, 0, settings).close()
    found = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    shown = found["_hparams_/session_start_info"].session_start_info.hparams
    assert shown.keys() == settings.keys() and "run_dir" not in shown
    assert shown["optim.learning_rate"].number_value == 5e-4
    assert shown["lora.targets"].string_value == "('attention', 'mlp')"
    judged = found["_hparams_/experiment"].experiment.metric_infos
    assert "eval/loss" in {metric.name.tag for metric in judged}
