"""One measurement on the first device of JAX: a child of `accelerator.py`.

    python tests/bench/card_measures.py step '{"preset": "llama-1b"}'

Prints a JSON object a line as soon as a number is known, so that a later failure costs
no earlier result. Needs jax, flax, optax and numpy alone: weights and tokens are drawn
on the device, and the step is the one that `research.train` compiles.
"""

import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from card_job import Job, attention_calls, draw_weights, peak, peak_memory_gb
from card_kernels import kernels, seconds_of
from card_resume import half, resume
from traced_operations import trace

from research.config.knob_groups import MeshConfig, ModelConfig
from research.engine.requests import Sampling
from research.engine.slot_decoder import SlotDecoder, SlotSettings
from research.models.attention import ScoreRule
from research.models.cached_attention import room_for
from research.models.make_model import make_model
from research.models.paged_attention import can_attend_pages
from research.models.presets import preset as find_preset
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.train.metrics import throughput
from research.train.step import train_step
from research.weights import parameter_paths

Result = dict[str, Any]
# Operations of a profile that are reported.
LONGEST = 30


def installed() -> dict[str, str]:
    """Versions of what a figure may depend on, as far as it is installed."""
    wanted = re.compile(r"(jax|flax|optax|orbax|torch|transformers|peft|nvidia|libtpu)")
    return {
        found.name: found.version
        for found in metadata.distributions()
        if wanted.match(found.name)
    }


def device(size: int = 8192, copied: int = 2**29, times: int = 20) -> Iterator[Result]:
    """The device, the rate of a product of random matrices, and of a copy.

    Args:
      size: of the square matrices.
      copied: float32 values.
      times: calls that are timed.
    """
    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    yield {
        "kind": first.device_kind,
        "platform": first.platform,
        "capability": str(getattr(first, "compute_capability", "")),
        "memory_gb": stats.get("bytes_limit", 0) / 1e9,
        "versions": {"python": sys.version.split()[0], **installed()},
        "runtime": first.client.platform_version.partition("\n")[0],
    }
    keys = jax.random.split(jax.random.key(0), 2)
    exact = None
    for dtype, precision in (
        ("bfloat16", None), ("float32", None), ("float32", "highest"),
    ):  # fmt: skip
        small = size if dtype == "bfloat16" else size // 2
        x, y = (jax.random.normal(key, (small, small), dtype) for key in keys)
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        took = seconds_of(functools.partial(product, x, y), times)
        found = {
            "product": dtype,
            "precision": precision or "default",
            "tflops": 2 * small**3 / took / 1e12,
        }
        if dtype == "float32":
            # Rows are enough to see how many bits of the factors a product reads.
            exact = np.asarray(x[:64], np.float64) @ np.asarray(y, np.float64)
            off = np.asarray(product(x, y)[:64]) - exact
            found["error"] = float(np.linalg.norm(off) / np.linalg.norm(exact))
        yield found
    x = jax.random.normal(keys[0], (copied,), "float32")
    took = seconds_of(functools.partial(jax.jit(lambda x: x + 1), x), times)
    yield {"copy_gb_per_s": 8 * copied / took / 1e9}


def step(
    trainable: str = "full",
    preset: str = "llama-1b",
    rows: int = 32,
    micro: int = 8,
    seq: int = 2048,
    documents: int = 1,
    rank: int = 16,
    steps: int = 3,
    warmup: int = 1,
    profile: bool = False,
    run: bool = True,
    **knobs: Any,
) -> Iterator[Result]:
    """The speed and the memory of an optimizer step, every position trained.

    Args:
      trainable: "full" as `configs/pretrain_1b.py`, or "lora" as `finetune_8b.py`.
      preset: shape of the model.
      rows: of an optimizer step.
      micro: rows of a pass.
      seq: tokens of a row.
      documents: of each row.
      rank: of the adapters.
      steps: that count.
      warmup: that do not, after the one that compiles.
      profile: also report the operations that take the longest.
      run: where it is false the step is traced alone, which finds wrong settings.
      knobs: of `config.model`, such as remat, quantize and loss_chunk.

    Recomputation counts for nothing in `mfu`, which is `tflops` over the `peak` of the
    device in bf16; `research.train.metrics.throughput` has the formula. `memory_gb` is
    the peak of the whole process, with the drawing of the weights, and `step_gb` what
    the compiled step holds, its arguments included.
    """
    begun = time.perf_counter()
    job = Job.make(trainable, preset, seq, micro, rank, **knobs)
    train = train_step.jit_train_step(job.definition)
    batch = job.batch(rows, micro, seq, documents=documents)
    if not run:
        traced = train.trace(*jax.eval_shape(job.start), batch)
        yield {"equations": len(traced.jaxpr.eqns), "attention": job.kernel.kernel}
        return
    state, frozen = jax.block_until_ready(job.start())
    start_s = time.perf_counter() - begun
    begun = time.perf_counter()
    train = train.lower(state, frozen, batch).compile()
    compile_s = time.perf_counter() - begun
    seconds = []
    for _ in range(1 + warmup + steps):
        begun = time.perf_counter()
        state, sums = train(state, frozen, batch)
        jax.block_until_ready((state, sums))
        seconds.append(time.perf_counter() - begun)
    step_s = statistics.median(seconds[1 + warmup :])
    model = job.definition.model
    used = throughput.count_used(state.params, model)
    flops = throughput.count_flops(model.architecture, used, full=trainable == "full")
    needed = flops.step(*(float(sums[name]) for name in ("tokens", "weight", "pairs")))
    most, named = peak()
    yield {
        "tokens_per_s": rows * seq / step_s,
        "step_s": step_s,
        "seconds": [round(value, 4) for value in seconds],
        "tflops": needed / step_s / 1e12,
        "mfu": needed / step_s / most if most else None,
        "peak": named,
        "memory_gb": peak_memory_gb(),
        "step_gb": _held_bytes(train) / 1e9,
        "frozen_gb": parameter_paths.nbytes(frozen) / 1e9,
        **attention_calls(job.kernel.kernel, train.as_text()),
        "why": job.kernel.reason,
        "start_s": start_s,
        "compile_s": compile_s,
        "positions": int(sums["weight"]),
        "trained": parameter_paths.count(state.params),
        "loss": float(sums["means"]["loss"]),
    }
    if profile:
        yield {"operations": _profile(lambda: train(state, frozen, batch)[1])}


def _held_bytes(compiled: Any) -> int:
    """The bytes of a program: arguments, other results, and those in between."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def _profile(call: Callable[[], Any]) -> list[list[Any]]:
    """Name, milliseconds and calls of the operations that take longest in one call."""
    total: dict[str, list[float]] = {}
    for line in trace(call):
        for event in line.events:
            entry = total.setdefault(event.name, [0.0, 0])
            entry[0] += event.duration_ns / 1e6
            entry[1] += 1
    longest = sorted(total.items(), key=lambda item: -item[1][0])[:LONGEST]
    return [[name[:100], round(ms, 3), calls] for name, (ms, calls) in longest]


def decode(
    preset: str = "llama3.1-8b",
    batches: Sequence[int] = (1, 16, 64),
    prompt: int = 128,
    new: int = 64,
) -> Iterator[Result]:
    """Tokens a second of the slot decoder, greedily, with every slot answering.

    Args:
      preset: shape of the model, in bfloat16.
      batches: slots.
      prompt: ids of each prompt.
      new: ids of each answer that are timed.
    """
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    config = ModelConfig(preset=preset)
    model = make_model(config, find_preset(preset), mesh, length=prompt, rows=1)
    params = draw_weights(model, jnp.bfloat16)
    size = sum(x.nbytes for x in params.values())
    ids = [int(x) for x in np.random.default_rng(0).integers(0, 200, prompt)]
    for count in batches:
        begun = time.perf_counter()
        decoder = SlotDecoder(model, params, count, prompt + 3 * new, mesh=mesh)
        answer(decoder, [0], ids, 3 * new)  # Compiles what the others run, and no more.
        decoder.free(0)
        compile_s = time.perf_counter() - begun
        traced, begun = decoder.traces, time.perf_counter()
        answer(decoder, range(count), ids, 3 * new)
        prefill_s = time.perf_counter() - begun
        begun, calls = time.perf_counter(), -(-new // decoder.rounds)
        for _ in range(calls):
            decoder.decode()
        seconds, steps = time.perf_counter() - begun, calls * decoder.rounds
        if decoder.traces != traced:
            raise RuntimeError("a timed call compiled a program")
        decoder.close()
        yield {
            "slots": count,
            "attention": decoding_kernel(model, decoder),
            "tokens_per_s": count * steps / seconds,
            "ms_per_step": 1e3 * seconds / steps,
            "prefill_tokens_per_s": count * prompt / prefill_s,
            "weights_gb": size / 1e9,
            "memory_gb": peak_memory_gb(),
            "compile_s": compile_s,
        }


def decoding_kernel(model: Model, decoder: SlotDecoder) -> str:
    """The attention of a new token: TPUs' paged kernel, or blocks in plain XLA."""
    a = model.architecture
    new = jax.ShapeDtypeStruct(
        (decoder.slots, 1, a.heads, a.head_dim), model.options.dtype
    )
    room = room_for(decoder.length)
    cache = jax.ShapeDtypeStruct(
        (a.layers, decoder.slots, a.kv_heads, room, a.head_dim), model.options.dtype
    )
    rule = ScoreRule(max(a.windows), a.attention_softcap)
    paged = jax.devices()[0].platform == "tpu" and can_attend_pages(new, cache, rule)
    return "paged" if paged else "blocks"


def answer(
    decoder: SlotDecoder, slots: Sequence[int], ids: Sequence[int], most: int
) -> None:
    """Writes a prompt into each slot and takes the first tokens of the answers."""
    *first, last = ids
    for slot in slots:
        decoder.admit(slot, SlotSettings(Sampling(max_new_tokens=most)))
        for at in range(0, len(first), decoder.chunk):
            decoder.extend(slot, first[at : at + decoder.chunk])
        decoder.start(slot, last)
    decoder.decode()


MEASURES = {f.__name__: f for f in (device, kernels, step, decode, resume, half)}


def run(name: str, settings: Mapping[str, Any]) -> None:
    """Prints the results of a measurement as they come."""
    for result in MEASURES[name](**settings):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]))
