"""The loop gives streams a sign of life, and saves the position of all processes."""

import types

import jax

from research.config.knob_groups import MeshConfig
from research.data.batch_order import OrderedBatches, endless
from research.parallel import mesh, runtime
from research.runs.phase_timer import PhaseTimer
from research.train.programs.device_batches import DeviceBatches


class Stream(OrderedBatches):
    """Batches whose position differs by process."""

    def get_state(self):
        return {"place": [1, None]}

    def joined(self, states):
        places = zip(*(state["place"] for state in states), strict=True)
        return {"place": [next(filter(None, each), None) for each in places]}


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
    assert batches.whole_position(0) == {"data": {"place": [1, None]}, "pulled": 1}
    other = {"place": [None, 2]}
    monkeypatch.setattr(runtime, "gather_json", lambda own: [own, other])
    assert batches.whole_position(0) == {"data": {"place": [1, 2]}, "pulled": 1}
    silence = phases.silence
    stream.alive()
    assert phases.silence < silence
