"""Two processes answer as one: the first takes requests, the second follows."""

import json
import subprocess
import sys

import pytest
from commands import ENVIRONMENT, ROOT
from free_ports import free_port

PROGRAM = """
import json, sys, threading
import jax
rank, count, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, rank)
import numpy as np
from helpers import TINY, random_params
from research.config.knob_groups import MeshConfig
from research.engine.continuous_batching import Engine
from research.engine.followed_decoder import LeadingDecoder, follow
from research.engine.requests import Request, Sampling
from research.engine.slot_decoder import SlotDecoder
from research.models.transformer import Model
from research.parallel import agreement
from research.parallel import mesh as meshes
from research.tokenize.tokenizer_training import byte_tokenizer

model = Model(TINY)
mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices())
where = meshes.shardings(model.specs, mesh)
params = {
    path: jax.make_array_from_callback(
        x.shape, where[path], lambda index, x=x: np.asarray(x)[index]
    )
    for path, x in random_params(model.specs).items()
}
decoder = SlotDecoder(model, params, 2, 96, mesh=mesh, chunk=16)
if rank:
    follow(decoder, {}.__getitem__)
else:
    leading = LeadingDecoder(decoder)
    leading.warm_up()
    programs = lambda: (decoder.traces, agreement._largest()._cache_size())
    compiled = programs()
    engine = Engine(
        leading, byte_tokenizer(), prefix_bytes=2**20, when_idle=leading.flush
    )
    stop = threading.Event()
    runner = threading.Thread(target=engine.run_forever, args=[stop])
    runner.start()
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, TINY.vocab, n).tolist()) for n in (5, 70, 20)]
    bias = {i: i / 96 + 0.123456789012345 for i in range(96)}
    drawn = Sampling(max_new_tokens=8, temperature=1.0, seed=3, logit_bias=bias)
    answers = [engine.submit(Request(p, drawn)) for p in (*prompts, prompts[1])]
    said = [[i for piece in answer for i in piece.ids] for answer in answers]
    stop.set()
    runner.join()
    leading.end()
    assert programs() == compiled
    print(json.dumps([said, engine.stats().prefix_hits]))
"""


def answers(count):
    """The answers of `count` processes that have two devices together."""
    address = f"localhost:{free_port()}"
    support = str(ROOT / "tests" / "support")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{support}:{ROOT}"}
    environment |= {"JAX_NUM_CPU_DEVICES": str(2 // count)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(count), address],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ends = [process.communicate(timeout=500) for process in processes]
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err[-3000:]
    return json.loads(ends[0][0].splitlines()[-1])


@pytest.mark.soak
def test_two_processes_answer_as_one_does():
    said, hits = answers(2)
    assert (said, hits) == tuple(answers(1))
    assert said[1] == said[3] and [len(x) for x in said] == [8] * 4
    assert hits == 64
