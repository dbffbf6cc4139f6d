"""One measurement on the first device of JAX: a child of `accelerator.py`.

    python tests/bench/card_measures.py step '{"preset": "llama-1b"}'

Prints a JSON object a line as soon as a number is known, so that a later failure costs
no earlier result. Needs jax, flax, optax and numpy alone: weights and tokens are drawn
on the device, and the step is the one that `research.train` compiles.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from random_rows import random_rows

from research.config.knob_groups import LoRAConfig, MeshConfig, ModelConfig, OptimConfig
from research.core.errors import UserError
from research.data.token_batch import Batch
from research.engine.requests import Sampling
from research.engine.slot_decoder import SlotDecoder, SlotSettings
from research.models import attention_kernels
from research.models.make_model import choose_kernel, make_model
from research.models.presets import preset as find_preset
from research.models.transformer import Model
from research.parallel import chips
from research.parallel import mesh as meshes
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train.metrics import throughput
from research.train.step import optimizers, train_step
from research.weights import parameter_paths, trainable
from research.weights.parameter_spec import Spec

Result = dict[str, Any]
# As in configs/pretrain_1b.py and configs/finetune_8b.py, which a bare image cannot
# read; a test compares them.
OPTIM = {
    "full": OptimConfig(
        learning_rate=3e-4, warmup=0.02, b2=0.95, weight_decay=0.1, z_loss=1e-4,
        skip_spread=6.0,
    ),
    "lora": OptimConfig(learning_rate=2e-4),
}  # fmt: skip
STEPS = 1000  # The length of a run, for the schedule.
# bfloat16 keeps 8 bits; a sum over a row of products of rounded values stays within
# some of them. The tests hold every kernel to the same share of the largest value.
TOLERANCE = 2e-2
BLOCK = 128
# Operations of a profile that are reported.
LONGEST = 30


def seconds_of(call: Callable[[], Any], times: int) -> float:
    """Seconds of one call, of `times` that are given to the device at once."""
    jax.block_until_ready(call())
    begun = time.perf_counter()
    for _ in range(times):
        last = call()  # Earlier results free their memory.
    jax.block_until_ready(last)
    return (time.perf_counter() - begun) / times


def peak_memory_gb() -> float | None:
    """The most that the device held, in 10**9 bytes; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return peak / 1e9 if peak is not None else None


def peak_flops() -> float | None:
    chip = chips.by_device_kind(jax.devices()[0].device_kind)
    return chip.flops if chip else None


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


def kernels(
    shapes: Sequence[tuple[int, int, int]] = ((32, 8, 128), (32, 8, 64)),
    rows: int = 4,
    seq: int = 2048,
    documents: Sequence[int] = (3, 1),
    times: int = 10,
    only: Sequence[str] = (),
) -> Iterator[Result]:
    """Each attention kernel that works here against the plain formula in float32.

    Outputs and gradients of packed rows in bfloat16. A kernel is wrong where it is
    further off than `TOLERANCE` of the largest value. `causal` is cuDNN without the
    mask of documents, and `packed` with their places instead: what the mask costs.

    Args:
      shapes: heads, key heads and width.
      rows: of a batch.
      seq: tokens of a row.
      documents: of a row, for each measurement.
      times: passes forward and backward that are timed.
      only: names of kernels; all of them where it is empty.
    """
    first = jax.devices()[0]
    capability = str(getattr(first, "compute_capability", "0.0"))
    for heads, kv_heads, width in shapes:
        counts = heads, kv_heads, kv_heads, heads
        keys = jax.random.split(jax.random.key(0), 4)
        drawn = tuple(
            jax.random.normal(key, (rows, seq, n, width), jnp.bfloat16)
            for key, n in zip(keys, counts, strict=True)
        )
        for number in documents:
            segments = jnp.asarray(
                random_rows((rows, seq), 2, documents=number)["segments"]
            )
            exact = [np.asarray(x) for x in _exact(drawn, segments)]
            setting = {
                "heads": f"{heads}/{kv_heads} of {width}",
                "layout": f"{rows} x {seq}, {number} documents a row",
            }
            pairs = rows * sum(
                n * (n + 1) / 2 for n in np.unique(segments[0], return_counts=True)[1]
            )
            for kernel in only or _kernels_here(number):
                found = {"kernel": kernel, **setting}
                try:
                    if kernel in attention_kernels.KERNELS:
                        attention_kernels.choose(
                            kernel, first.platform, dtype=jnp.bfloat16,
                            head_dim=width, length=seq, capability=capability,
                        )  # fmt: skip
                    run = functools.partial(
                        _both_passes, drawn, segments, kernel=kernel, documents=number
                    )
                    off = max(map(_distance, run(), exact))
                    took = seconds_of(run, times)
                except UserError as error:
                    reason = str(error).partition(": ")[2].partition(";")[0]
                    yield {**found, "not_here": reason}
                except Exception as error:  # Another kernel may still work.
                    yield {**found, "failed": f"{type(error).__name__}: {error}"[:500]}
                else:
                    yield {
                        **found,
                        "ms": 1e3 * took,
                        "tflops": 12 * heads * width * pairs / took / 1e12,
                        "off": off,
                        # Not `>`: what is not a number is wrong as well.
                        "right": bool(off <= TOLERANCE),
                    }


def _kernels_here(documents: int) -> list[str]:
    """Ours, the plain formula, and on a GPU how else cuDNN can compute such rows."""
    names = [*attention_kernels.KERNELS, "plain"]
    if jax.devices()[0].platform in ("gpu", "cuda"):
        names.append("causal" if documents == 1 else "packed")
    return names


@functools.partial(jax.jit, static_argnames=("kernel", "documents"))
def _both_passes(drawn, segments, *, kernel: str, documents: int):
    """The output and the gradients of queries, keys and values."""
    *inputs, d_output = drawn

    def attention(q, k, v):
        if kernel == "plain":
            index = jnp.arange(segments.shape[1])
            allowed = segments[:, :, None] == segments[:, None, :]
            allowed &= (index[:, None] >= index[None])[None]
            return jax.nn.dot_product_attention(
                q, k, v, mask=allowed[:, None], implementation="xla"
            )
        if kernel == "causal":
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation="cudnn"
            )
        if kernel == "packed":
            return _packed(q, k, v, segments, documents)
        return attention_kernels.packed_attention(
            q, k, v, segments, segments, kernel=kernel, block=BLOCK
        )

    output, backward = jax.vjp(attention, *inputs)
    return output, *backward(d_output)


def _packed(q, k, v, segments, documents: int):
    """cuDNN with the places of documents in place of a mask; no public function yet."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    numbers = jnp.arange(1, documents + 1)
    lengths = jnp.sum(segments[:, :, None] == numbers, axis=1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return fused.dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets,
        scale=q.shape[-1] ** -0.5, mask_type=fused.MaskType.PADDING_CAUSAL,
    )  # fmt: skip


def _exact(drawn, segments):
    # Also on devices whose float32 products are of fewer bits by default.
    with jax.default_matmul_precision("highest"):
        wide = tuple(x.astype(jnp.float32) for x in drawn)
        return _both_passes(wide, segments, kernel="plain", documents=0)


def _distance(found: jax.Array, exact: np.ndarray) -> float:
    """The largest difference as a share of the largest exact value."""
    difference = np.abs(np.asarray(found, np.float32) - exact)
    share = float(difference.max() / np.abs(exact).max())
    return share if np.isfinite(share) else float("inf")


@dataclasses.dataclass(frozen=True)
class Job:
    """A training step on one device, and what it starts from."""

    definition: train_step.StepDefinition
    kernel: str

    @classmethod
    def make(
        cls, kind: str, preset: str, seq: int, micro: int, rank: int, **knobs: Any
    ) -> "Job":
        """The step of `kind` ("full" or "lora"); `knobs` are those of the model."""
        mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        config = ModelConfig(preset=preset, **knobs)
        architecture = find_preset(preset)
        model = make_model(config, architecture, mesh, length=seq, rows=micro)
        split = trainable.make(kind, config, LoRAConfig(rank=rank), model.specs)
        optim = OPTIM[kind]
        chosen = choose_kernel(config, architecture, mesh, length=seq, rows=micro)
        return cls(
            train_step.StepDefinition(
                model=model,
                trainable=split,
                optimizer=optimizers.make_optimizer(optim, STEPS, split.specs),
                mesh=mesh,
                objective=CrossEntropy(
                    1, config.loss_chunk, meshes.shards(mesh), optim.z_loss, mesh
                ),
            ),
            chosen.kernel,
        )

    def start(self) -> tuple[train_step.TrainState, dict[str, Any]]:
        """The state of step 0 and the frozen weights, all drawn on the device."""
        split, key = self.definition.trainable, jax.random.key(0)
        full = not split.frozen_specs
        base = draw_weights(
            self.definition.model, split.dtype if full else split.frozen_dtype
        )
        params = base if full else jax.jit(split.init)(key, base)
        state = train_step.jit_init(self.definition)(params)
        return state, {} if full else base

    def batch(self, rows: int, micro: int, seq: int, seed: int = 0, **how) -> Batch:
        """Random rows on the device, in passes of `micro`."""
        vocab = self.definition.model.architecture.vocab
        drawn = random_rows((rows, seq), vocab, **how)
        drawn["tokens"] = (drawn["tokens"] + seed) % vocab
        drawn["targets"] = np.roll(drawn["tokens"], -1, axis=1)
        groups = np.zeros((rows, seq), np.int32)
        whole = Batch(groups=groups, **drawn)
        return meshes.to_global(whole, self.definition.mesh, rows // micro)


def draw_weights(model: Model, dtype: Any) -> dict[str, jax.Array]:
    """Random weights of `dtype`, distributed as `Model.init` has them.

    One after the other: all in one program take 79 GB for 8B parameters, because the
    float32 values of many live at the same time.
    """

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, spec: Spec) -> jax.Array:
        if spec.std == 0.0:
            return jnp.ones(spec.shape, dtype)
        return spec.std * jax.random.normal(key, spec.shape, dtype)

    keys = jax.random.split(jax.random.key(0), len(model.specs))
    pairs = zip(keys, model.specs.items(), strict=True)
    return {path: draw(key, spec) for key, (path, spec) in pairs}


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
    **knobs: Any,
) -> Iterator[Result]:
    """The speed of an optimizer step, every position trained.

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
      knobs: of `config.model`, such as remat, attention and loss_chunk.

    Recomputation counts for nothing in `mfu`.
    """
    begun = time.perf_counter()
    job = Job.make(trainable, preset, seq, micro, rank, **knobs)
    state, frozen = jax.block_until_ready(job.start())
    start_s = time.perf_counter() - begun
    batch = job.batch(rows, micro, seq, documents=documents)
    train = train_step.jit_train_step(job.definition)
    seconds = []
    for _ in range(1 + warmup + steps):
        begun = time.perf_counter()
        state, sums = train(state, frozen, batch)
        jax.block_until_ready((state, sums))
        seconds.append(time.perf_counter() - begun)
    step_s = statistics.median(seconds[1 + warmup :])
    count = parameter_paths.count(state.params)
    model = job.definition.model
    used = throughput.count_used(state.params, model)
    full = trainable == "full"
    flops = throughput.count_flops(model.architecture, used, full=full)
    needed = flops.step(*(float(sums[name]) for name in ("tokens", "weight", "pairs")))
    peak = peak_flops()
    yield {
        "tokens_per_s": rows * seq / step_s,
        "step_s": step_s,
        "seconds": [round(value, 4) for value in seconds],
        "tflops": needed / step_s / 1e12,
        "mfu": needed / step_s / peak if peak else None,
        "memory_gb": peak_memory_gb(),
        "attention": job.kernel,
        "start_s": start_s,
        "compile_s": seconds[0] - step_s,
        "positions": int(sums["weight"]),
        "trained": count,
        "loss": float(sums["means"]["loss"]),
    }
    if profile:
        yield {"operations": _profile(lambda: train(state, frozen, batch)[1])}


def _profile(call: Callable[[], Any]) -> list[list[Any]]:
    """Name, milliseconds and calls of the operations that take longest in one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        traces = [*Path(folder).rglob("*.xplane.pb")]
        planes = [
            plane
            for trace in traces
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        ]
    on_device = [p for p in planes if p.name.startswith("/device:")] or planes
    total: dict[str, list[float]] = {}
    for plane in on_device:
        lines = [*plane.lines]
        # Other lines of a GPU repeat the same time by module and by scope.
        streams = [line for line in lines if line.name.startswith("Stream")] or lines
        for line in streams:
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
        decoder = SlotDecoder(model, params, count, prompt + 3 * new, mesh=mesh)
        decoder.warm_up()
        settings = SlotSettings(Sampling(max_new_tokens=3 * new))
        begun = time.perf_counter()
        for slot in range(count):
            decoder.admit(slot, settings)
            for at in range(0, prompt - 1, decoder.chunk):
                decoder.extend(slot, ids[at : min(at + decoder.chunk, prompt - 1)])
            decoder.start(slot, ids[-1])
        decoder.decode()
        prefill_s = time.perf_counter() - begun
        begun, calls = time.perf_counter(), -(-new // decoder.rounds)
        for _ in range(calls):
            decoder.decode()
        seconds, steps = time.perf_counter() - begun, calls * decoder.rounds
        decoder.close()
        yield {
            "slots": count,
            "tokens_per_s": count * steps / seconds,
            "ms_per_step": 1e3 * seconds / steps,
            "prefill_tokens_per_s": count * prompt / prefill_s,
            "weights_gb": size / 1e9,
            "memory_gb": peak_memory_gb(),
        }


# By case: XLA_FLAGS, and whether both processes share a compile cache, as runs do.
RESUMES = {
    "no flag": ("", True),
    "exclude_nondeterministic_ops": (
        "--xla_gpu_exclude_nondeterministic_ops=true", True,
    ),
    "exclude_nondeterministic_ops, no compile cache": (
        "--xla_gpu_exclude_nondeterministic_ops=true", False,
    ),
    "deterministic_ops, no compile cache": (
        "--xla_gpu_deterministic_ops=true", False,
    ),
}  # fmt: skip


def resume(
    preset: str = "llama-125m",
    steps: int = 8,
    rows: int = 8,
    seq: int = 1024,
    cases: Sequence[str] = tuple(RESUMES),
) -> Iterator[Result]:
    """Whether a second process, started from half way, gives the same bits.

    For each case one process trains `steps` steps and saves its state after half of
    them; another one starts from that state. All cases run at the same time.
    """
    with tempfile.TemporaryDirectory() as folder:
        said: dict[str, list[Result]] = {case: [] for case in cases}
        for resumed in (False, True):
            children = {}
            for number, case in enumerate(cases):
                flags, cached = RESUMES[case]
                place = Path(folder) / str(number)
                given = {
                    "preset": preset, "steps": steps, "rows": rows, "seq": seq,
                    "saved": f"{place}.npz", "resumed": resumed,
                }  # fmt: skip
                children[case] = subprocess.Popen(
                    [sys.executable, __file__, "half", json.dumps(given)],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=_shared_card(flags, f"{place}.compiled" if cached else ""),
                )
            for case, child in children.items():
                out, _ = child.communicate()
                if child.returncode == 0:
                    said[case].append(json.loads(out.splitlines()[-1]))
    failed = False
    for case, halves in said.items():
        if len(halves) < 2:
            yield {"case": case, "failed": "a process of it ended with an error"}
            failed = True
            continue
        whole, second = halves
        common = whole["losses"][-len(second["losses"]) :]
        yield {
            "case": case,
            "exact": common == second["losses"] and whole["end"] == second["end"],
            "equal_losses": sum(map(str.__eq__, common, second["losses"])),
            "of": len(common),
            "equal_state": whole["end"] == second["end"],
            "losses": [float.fromhex(x) for x in whole["losses"]],
            "resumed": [float.fromhex(x) for x in second["losses"]],
        }
    if failed:
        raise RuntimeError("see the errors of the processes above")


def _shared_card(flags: str, compiled: str) -> dict[str, str]:
    """The environment of a process that shares the card with others."""
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS", ""), flags)))
    removed = ("XLA_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in removed}
    cache = {"JAX_COMPILATION_CACHE_DIR": compiled} if compiled else {}
    return {
        **kept, **cache, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }  # fmt: skip


def half(
    preset: str, steps: int, rows: int, seq: int, saved: str, resumed: bool
) -> Iterator[Result]:
    """All steps, or those after the state in `saved`: losses and the last state."""
    job = Job.make("full", preset, seq, rows // 2, 16)
    state, frozen = job.start()
    leaves, structure = jax.tree.flatten(state)
    if resumed:
        with np.load(saved) as file:
            found = [file[str(number)] for number in range(len(leaves))]
        state = structure.unflatten(
            jax.device_put(x, leaf.sharding)
            for x, leaf in zip(found, leaves, strict=True)
        )
    train = train_step.jit_train_step(job.definition)
    losses = []
    for number in range(steps // 2 if resumed else 0, steps):
        if number == steps // 2 and not resumed:
            arrays = map(np.asarray, jax.tree.leaves(state))
            np.savez(saved, **{str(i): x for i, x in enumerate(arrays)})
        batch = job.batch(rows, rows // 2, seq, seed=7919 * number, documents=3)
        state, sums = train(state, frozen, batch)
        losses.append(float(sums["means"]["loss"]).hex())
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    yield {"losses": losses, "end": digest.hexdigest()}


MEASURES = {f.__name__: f for f in (device, kernels, step, decode, resume, half)}


def main() -> None:
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    for result in MEASURES[name](**settings):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
