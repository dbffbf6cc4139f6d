"""The loop gives streams a sign of life, and saves the position of all processes."""

import types

import jax
import numpy as np
import pytest

from research.config.knob_groups import MeshConfig
from research.core.errors import UnreachableError
from research.data.batch_order import OrderedBatches, endless
from research.parallel import agreement, mesh
from research.runs.control.os_signals import Preempted, StopRequest
from research.runs.phase_timer import PhaseTimer
from research.train.programs.device_batches import DeviceBatches


class Stream(OrderedBatches):
    """Batches whose position differs by process."""

    def get_state(self):
        return {"place": ["1", ""]}

    def joined(self, state, union):
        return {"place": union(state["place"])}


def other_process(*texts):
    """The maximum over this process and one that knows these texts."""
    width = max(map(len, texts))
    letters = "".join(text.ljust(width, "\0") for text in texts).encode()
    theirs = iter([[width], np.frombuffer(letters, np.uint8)])
    return lambda mine: np.maximum(mine, np.array(next(theirs), np.int32))


def test_the_position_to_save_is_that_of_all_processes(monkeypatch):
    stream = Stream(endless(0, 8, seed=0), lambda numbers: numbers, 4)
    phases = PhaseTimer()
    run = types.SimpleNamespace(
        definition=types.SimpleNamespace(
            mesh=mesh.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        ),
        config=types.SimpleNamespace(data=types.SimpleNamespace(batch_size=4)),
        task=types.SimpleNamespace(batches=lambda rows: stream),
        history=types.SimpleNamespace(skipped=[]),
        microbatches=1,
        phases=phases,
    )
    batches = DeviceBatches([run], [None], lambda pulled, held_out: pulled)
    next(batches)
    assert batches.whole_position(0) == {"data": {"place": ["1", ""]}, "pulled": 1}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "_maximum", other_process("", "22"))
    assert batches.whole_position(0) == {"data": {"place": ["1", "22"]}, "pulled": 1}
    silence = phases.silence
    stream.alive()
    assert phases.silence < silence


def test_data_that_stays_away_ends_the_wait_like_a_signal():
    """So what is done is saved, and the error comes after that."""
    away = UnreachableError("no route to the hub")

    def pull():
        raise away

    with StopRequest(PhaseTimer()) as stop:
        with pytest.raises(Preempted):
            stop.wait(pull)
        assert stop.unreachable is away and stop.signal is None
