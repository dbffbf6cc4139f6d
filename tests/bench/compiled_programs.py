"""The programs of a run and of a server, compiled for one CPU with tiny sizes.

All arguments are shapes, so nothing is loaded, drawn or run.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.config.run_config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    TextConfig,
)
from research.engine.slot_decoder import SlotDecoder
from research.models.architecture import Architecture
from research.models.presets import PRESETS
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes
from research.plan.abstract_step import AbstractStep, make_abstract_step
from research.plan.compiled import compile_step
from research.train.programs import pack_arrays, pack_step
from research.train.step import train_step

SHAPE = dataclasses.replace(PRESETS["tiny"], kv_heads=2, vocab=512)
# The LoRA step shows what a loop over layers costs; other steps only differ in a layer.
SHALLOW = dataclasses.replace(SHAPE, layers=1)
TARGETS = ("attention.query", "mlp.down")
TOGETHER_RANKS = (2, 4)
# One, as each costs a second to compile: the first, to see the way back over all codes.
TOGETHER_TARGETS = TARGETS[:1]
SLOTS, LENGTH, CHUNK = 4, 96, 32


def make_step(
    trainable: str = "lora",
    *,
    kind: str = "lora",
    quantize: str = "none",
    shape: Architecture = SHAPE,
    targets: tuple[str, ...] = TARGETS,
) -> AbstractStep:
    """The step of a job in bfloat16: two passes of two packed rows of 64 tokens."""
    full = trainable == "full"
    config = Config(
        trainable=trainable,
        model=ModelConfig(
            init_from="" if full else "planned",
            preset="tiny",
            dtype="bfloat16",
            loss_chunk=32,  # A pass has 128 positions.
            quantize=quantize,
        ),
        lora=LoRAConfig(kind=kind, rank=4, alpha=8.0, targets=targets),
        data=DataConfig(
            kind="text" if full else "instructions",
            seq_len=64,
            batch_size=4,
            microbatch_size=2,
        ),
        text=TextConfig(sources=("a=b",), tokenizer="byte"),
    )
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    return make_abstract_step(config, shape, mesh)


def training(*job: str, **options: Any) -> jax.stages.Lowered:
    """The train step; the arguments are those of `make_step`."""
    return compile_step.lower(make_step(*job, **options))


def evaluation() -> jax.stages.Lowered:
    """The sums of held-out rows, with adapters over an int8 base."""
    step = make_step(quantize="int8")
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), step.batch
    )
    program = train_step.jit_eval_step(step.definition)
    return program.lower(step.state.params, step.frozen, rows)


def together() -> jax.stages.Lowered:
    """One of several DoRA runs over an NF4 base, as a CPU trains them in turn.

    One program for three ideas, as compiling a step is most of what the guard costs.
    """
    step = make_step(
        kind="dora", quantize="nf4", shape=SHALLOW, targets=TOGETHER_TARGETS
    )
    config, specs = step.config, step.definition.model.specs
    configs = [
        dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=rank))
        for rank in TOGETHER_RANKS
    ]
    kind, factors = pack_arrays.union(specs, configs)
    pack = pack_step.make_pack_definition(
        config, step.definition, kind, factors, dropout=False, at_once=0
    )
    numbers = jax.eval_shape(
        lambda: pack_arrays.run_numbers(config, specs, factors, has_factors=False)
    )
    state = train_step.abstract_state(pack.definition)
    return pack_step.jit_run_step(pack).lower(numbers, state, step.frozen, step.batch)


@functools.cache
def serving() -> tuple[SlotDecoder, dict[str, Any], Any]:
    """A decoder of four slots, and its parameters and state as shapes."""
    model = Model(SHAPE, Options(dtype=jnp.bfloat16))
    decoder = SlotDecoder(model, None, SLOTS, LENGTH, chunk=CHUNK)
    params = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)
        for path, spec in model.specs.items()
    }
    return decoder, params, jax.eval_shape(decoder._empty)


def decoding() -> jax.stages.Lowered:
    """The next token of every slot."""
    decoder, params, state = serving()
    return decoder._decode.lower(params, state)


def prefill() -> jax.stages.Lowered:
    """A chunk of a prompt."""
    decoder, params, state = serving()
    number, flag = (jax.ShapeDtypeStruct((), kind) for kind in (jnp.int32, jnp.bool))
    ids = jax.ShapeDtypeStruct((2, CHUNK), jnp.int32)
    return decoder._extend.lower(params, state, number, ids, number, flag, flag)


PROGRAMS: dict[str, Callable[[], jax.stages.Lowered]] = {
    "LoRA step": training,
    "pre-training step": lambda: training("full", shape=SHALLOW),
    "step of a DoRA run in a pack over NF4": together,
    "evaluation step over int8": evaluation,
    "decoding": decoding,
    "prefill": prefill,
}
