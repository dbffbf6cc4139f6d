"""The programs that `tpu_schedule.py` compiles: a model's layer on slices of TPUs.

The layers of a model are one body that a scan repeats, so a few of them show what all
would do. Rows, slots and lengths are those of a large job.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from abstract_slots import abstract_state
from jax.sharding import Mesh

from research.config.knob_groups import MeshConfig
from research.config.run_config import Config, DataConfig, ModelConfig, TextConfig
from research.engine.slot_decoder import SlotDecoder
from research.models.architecture import Architecture
from research.models.make_model import make_model
from research.models.presets import PRESETS
from research.parallel import mesh as meshes
from research.plan import abstract_step
from research.plan.compiled import compile_step
from research.plan.planned_devices import parse_topology

MODELS = {"8B": "llama3.1-8b", "30B-A3B": "qwen3-30b-a3b"}
SLOTS, ROOM, PROMPT = 64, 4096, 256  # of an engine: answers, tokens of one, a chunk


@dataclasses.dataclass(frozen=True)
class TpuProgram:
    """One program on one slice.

    Attributes:
      kind: `lora` and `full` are training steps; `decode` and `prefill` are those of
        the engine: rounds of one token a slot, and a chunk of one prompt.
      model: a key of `MODELS`.
      topology: as `v5e:4x4`.
      mesh: sizes of axes; the others are 1.
      seq: tokens of a row of training; each chip has one row.
    """

    kind: str
    model: str
    topology: str
    mesh: tuple[tuple[str, int], ...]
    seq: int = 2048

    @property
    def name(self) -> str:
        axes = " ".join(f"{axis}={size}" for axis, size in self.mesh)
        return f"{self.kind} {self.model} {self.topology} {axes}"

    def architecture(self, layers: int) -> Architecture:
        """The shape of the model with fewer layers."""
        return dataclasses.replace(PRESETS[MODELS[self.model]], layers=layers)

    def make_mesh(self) -> Mesh:
        devices = compile_step.topology_devices(parse_topology(self.topology))
        return meshes.make_mesh(MeshConfig(**{"data": 1} | dict(self.mesh)), devices)

    def lower(self, layers: int) -> tuple[jax.stages.Lowered, Mesh]:
        """The program with so many layers, ready to be compiled, and its mesh."""
        mesh = self.make_mesh()
        architecture = self.architecture(layers)
        if self.kind in ("lora", "full"):
            return _train_step(self, architecture, mesh), mesh
        return _engine_program(self, architecture, mesh), mesh


def _program(kind: str, model: str, topology: str, **mesh: int) -> TpuProgram:
    return TpuProgram(kind, model, topology, tuple(mesh.items()))


PROGRAMS = (
    _program("lora", "8B", "v5e:4x4", fsdp=16),
    _program("lora", "8B", "v5p:2x4x4", fsdp=32),
    _program("lora", "8B", "v6e:8x8", fsdp=64),
    _program("full", "8B", "v5e:8x8", fsdp=64),
    _program("full", "8B", "v5p:4x8x8", fsdp=256),
    _program("full", "8B", "v5p:4x8x8", data=4, fsdp=64),
    _program("full", "8B", "v6e:16x16", fsdp=256),
    _program("decode", "8B", "v5e:4x4", data=2, tensor=8),
    _program("decode", "8B", "v5p:2x4x4", data=4, tensor=8),
    _program("decode", "8B", "v6e:4x4", data=2, tensor=8),
    _program("prefill", "8B", "v5e:4x4", data=2, tensor=8),
    _program("prefill", "8B", "v5p:2x4x4", data=4, tensor=8),
    _program("prefill", "8B", "v6e:4x4", data=2, tensor=8),
    _program("lora", "30B-A3B", "v5e:4x4", fsdp=2, expert=8),
    _program("lora", "30B-A3B", "v6e:8x8", fsdp=8, expert=8),
    _program("full", "30B-A3B", "v5p:4x4x4", fsdp=8, expert=8),
    _program("full", "30B-A3B", "v6e:16x16", fsdp=32, expert=8),
    _program("decode", "30B-A3B", "v5e:4x4", expert=4, tensor=4),
    _program("decode", "30B-A3B", "v5p:2x4x4", expert=8, tensor=4),
    _program("decode", "30B-A3B", "v6e:4x4", expert=4, tensor=4),
    _program("prefill", "30B-A3B", "v5e:4x4", expert=4, tensor=4),
    _program("prefill", "30B-A3B", "v5p:2x4x4", expert=8, tensor=4),
    _program("prefill", "30B-A3B", "v6e:4x4", expert=4, tensor=4),
)


def _train_step(
    program: TpuProgram, architecture: Architecture, mesh: Mesh
) -> jax.stages.Lowered:
    start = {"init_from": "hub://o/n" if program.kind == "lora" else ""}
    config = Config(
        trainable=program.kind,
        model=ModelConfig(preset=MODELS[program.model], remat="full", **start),
        mesh=MeshConfig(**dict(mesh.shape)),
        data=DataConfig("text", seq_len=program.seq, batch_size=mesh.size),
        text=TextConfig(sources=("web=hub://o/web",)),
    )
    step = abstract_step.make_abstract_step(config, architecture, mesh)
    return compile_step.lower(step)


def _engine_program(
    program: TpuProgram, architecture: Architecture, mesh: Mesh
) -> jax.stages.Lowered:
    config = ModelConfig(dtype="bfloat16")
    model = make_model(config, architecture, mesh, length=PROMPT, rows=mesh.size)
    # More chips along the batch axes have more slots.
    slots = SLOTS * meshes.batch_shards(mesh)
    decoder = SlotDecoder(model, None, slots, ROOM - 1, mesh=mesh, chunk=PROMPT)
    params = meshes.abstract_arrays(model.specs, mesh, jnp.bfloat16)
    state = abstract_state(decoder)
    if program.kind == "decode":
        return decoder._decode.lower(params, state)
    given = np.zeros((2, PROMPT), np.int32)
    numbers = np.int32(0), given, np.int32(PROMPT), np.bool(False), np.bool(False)
    return decoder._extend.lower(params, state, *numbers)
