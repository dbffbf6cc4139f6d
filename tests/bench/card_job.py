"""A training step on one device, on weights and tokens that are drawn there."""

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from random_rows import random_rows

from research.config.knob_groups import LoRAConfig, MeshConfig, ModelConfig, OptimConfig
from research.data.token_batch import Batch
from research.models.attention_kernels import KernelChoice
from research.models.make_model import choose_kernel, make_model
from research.models.presets import preset as find_preset
from research.models.transformer import Model
from research.parallel import chips
from research.parallel import mesh as meshes
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train.step import optimizers, train_step
from research.weights import trainable
from research.weights.parameter_spec import Spec
from research.weights.trainable import Trainable

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


def peak_memory_gb() -> float | None:
    """The most that the device held so far, in 10**9 bytes; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return peak / 1e9 if peak is not None else None


def peak() -> tuple[float | None, str]:
    """The device's peak in bf16 FLOP/s, None if it is not known, and its source."""
    kind = jax.devices()[0].device_kind
    chip = chips.by_device_kind(kind)
    if chip is None:
        return None, f"{kind} is not in research/parallel/chips.py"
    return chip.flops, f"{chip.flops / 1e12:g} TFLOP/s, {chip.name} ({chip.source})"


# The custom calls of cuDNN's attention, and of kernels that Pallas made for a TPU.
KERNEL_CALL = re.compile(r'custom_call_target="(__cudnn\$fmha\w+|tpu_custom_call)"')
BY_CALL = {"cudnn": "__cudnn", "cudnn_mask": "__cudnn", "splash": "tpu_custom_call"}


def attention_calls(kernel: str, hlo: str) -> Result:
    """Whether a program calls the attention kernel that was chosen.

    Args:
      kernel: of `attention_kernels.KERNELS`; `xla` and the plain formula have no call.
      hlo: the text of the program.

    Returns:
      `attention`, the kernel; `calls`, how often the text has each custom call of an
      attention kernel; `right`, false if the one that was chosen has none.
    """
    calls = collections.Counter(KERNEL_CALL.findall(hlo))
    known = BY_CALL.get(kernel)
    right = known is None or any(call.startswith(known) for call in calls)
    return {"attention": kernel, "calls": dict(calls), "right": right}


@dataclasses.dataclass(frozen=True)
class Job:
    """A training step on one device, and what it starts from."""

    definition: train_step.StepDefinition
    kernel: KernelChoice

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
            chosen,
        )

    def start(self) -> tuple[train_step.TrainState, dict[str, Any]]:
        """The state of step 0 and the frozen weights, all drawn on the device."""
        split, key = self.definition.trainable, jax.random.key(0)
        full = not split.frozen_specs
        dtype = split.dtype if full else split.frozen_dtype
        base = draw_weights(self.definition.model, dtype, split)
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


def draw_weights(
    model: Model, dtype: Any, split: Trainable | None = None
) -> dict[str, Any]:
    """Random weights of `dtype`, distributed as `Model.init` has them.

    One after the other: all in one program take 79 GB for 8B parameters, because the
    float32 values of many live at the same time. With `split` each is stored as that
    stores frozen weights, and a matrix in codes is made layer by layer, as a file is
    read: a stack of 32 layers in float32 is larger than all codes of the model.
    """

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, path: str, spec: Spec) -> Any:
        if spec.std == 0.0:
            weight = jnp.ones(spec.shape, dtype)
        else:
            weight = spec.std * jax.random.normal(key, spec.shape, dtype)
        return split.store(path, weight, spec) if split else weight

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw_layers(key: jax.Array, path: str, spec: Spec) -> Any:
        keys = jax.random.split(key, spec.shape[0])
        return jax.lax.map(lambda one: draw(one, path, spec.of_stack(1)), keys)

    def coded(path: str, spec: Spec) -> bool:
        frozen = split.frozen_specs if split else {}
        return bool(spec.stacked) and frozen.get(path, spec) != spec

    keys = jax.random.split(jax.random.key(0), len(model.specs))
    pairs = zip(keys, model.specs.items(), strict=True)
    return {
        path: (draw_layers if coded(path, spec) else draw)(key, path, spec)
        for key, (path, spec) in pairs
    }
