"""Opens a run directory for use: its parameters, on the devices of this machine.

Nothing here depends on the machine that trained the run. The attention kernel, the mesh
and the memory choices are those of this machine, and the optimizer state stays on disk.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from research.checkpoints.checkpointer import Checkpointer
from research.config.knob_groups import MeshConfig
from research.config.run_config import Config
from research.core.errors import DamagedError, UserError
from research.engine.text_generation import (
    SlotDecoders,
    TextGenerator,
    base_generator,
    tuned_generator,
)
from research.formats.base_model import Base
from research.formats.load_parameters import load_frozen
from research.models.make_model import model_of_run
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.runs.display_files import read_system
from research.runs.lineage.base_of_run import StoredRun, open_stored
from research.runs.lineage.start_pins import saved_step
from research.runs.run_directory import RunDir
from research.tasks.task_protocol import PromptFormat
from research.tasks.task_registry import prompt_format
from research.weights import trainable

Params = dict[str, Any]


class TrainedPrompts:
    """How a run's prompts become ids. Both kinds of opened runs have it."""

    folder: RunDir
    config: Config
    base: Base

    @property
    def prompts(self) -> PromptFormat:
        """The format of prompts that the run was trained with."""
        return self.prompts_with(self.system)

    @property
    def system(self) -> str:
        """The system text that all rows had, from the config or their own, or ""."""
        return read_system(self.folder.path, self.config.data.system)

    def prompts_with(self, system: str) -> PromptFormat:
        """`prompts` with another system text than that of training."""
        data = dataclasses.replace(self.config.data, system=system)
        return prompt_format(dataclasses.replace(self.config, data=data), self.base)


@dataclasses.dataclass(frozen=True)
class ReopenedRun(TrainedPrompts):
    """The parameters of a run, sharded over a mesh.

    Attributes:
      folder: of the run.
      step: the updates that `params` hold.
      config: of the run, with the choices of this machine; see `for_this_machine`.
      base: the base model that training began with.
      model: the decoder on `mesh`.
      mesh: devices that hold the parameters.
      trainable: the split into trained and frozen parameters.
      params: trained parameters as restored; for LoRA the adapters.
      frozen: frozen parameters; empty after full training.
    """

    folder: RunDir
    step: int
    config: Config
    base: Base
    model: Model
    mesh: Mesh
    trainable: trainable.Trainable
    params: Params
    frozen: Params

    @property
    def weights(self) -> Params:
        """Parameters of the model by path; adapters are attached, not added in."""
        return self.trainable.forward(self.params, self.frozen, None)

    def generators(self, *, compare: bool = False) -> dict[str, TextGenerator]:
        """The generator `tuned`; with `compare` the generator `base` before it.

        Raises:
          UserError: there is no base model, because training began at random.
        """
        decoders = SlotDecoders(self.model, self.mesh)
        tuned = tuned_generator(
            decoders, self.trainable, self.params, self.frozen, self.base.tokenizer
        )
        if not compare:
            return {"tuned": tuned}
        base = base_generator(decoders, self.base, self.frozen)
        if base is None:
            raise UserError("--compare: this run began with random weights, no model")
        return {"base": base, "tuned": tuned}


class FoundRun(TrainedPrompts, StoredRun):
    """A run whose config and base model are there; no parameter has been read."""

    def load(
        self,
        mesh: Mesh | None = None,
        *,
        devices: Sequence[Any] = (),
        step: str = "latest",
        in_compute_dtype: bool = False,
        decodes: bool = True,
        number: int | None = None,
    ) -> ReopenedRun:
        """Reads the parameters.

        Args:
          mesh: devices to shard the parameters over; by default `shared_mesh`.
          devices: of that; by default those of this process.
          step: the checkpoint: `latest` (the newest that can be used), `best`, or a
            number.
          in_compute_dtype: restores fully trained parameters in `config.model.dtype`,
            in which text is generated: half the memory where that is bfloat16.
          decodes: that of `fitting_mesh`.
          number: that of `restored`.

        Raises:
          UserError: there is no such checkpoint, or a parameter does not divide over
            `mesh`.
          DamagedError: the checkpoint is damaged or not finite.
        """
        config, base, split = self.config, self.base, self.trainable
        wanted_specs = {**self.specs, "trained": split.specs}
        devices = devices or jax.local_devices()
        mesh = mesh or shared_mesh(wanted_specs, devices, decodes=decodes)
        model = model_of_run(config.model, config.data, base.architecture, mesh)
        narrow = in_compute_dtype and not split.frozen_specs
        dtype = model.options.dtype if narrow else split.dtype
        number, params = self.restored(mesh, step, dtype, number)
        frozen: Params = {}
        if split.frozen_specs:
            frozen = load_frozen(base, model, mesh, split, config.seed)
        return ReopenedRun(
            folder=self.folder,
            step=number,
            config=config,
            base=base,
            model=model,
            mesh=mesh,
            trainable=split,
            params=params,
            frozen=frozen,
        )

    def restored(
        self,
        mesh: Mesh,
        step: str = "latest",
        dtype: Any = None,
        number: int | None = None,
    ) -> tuple[int, Params]:
        """Reads the trained parameters alone: the adapters, or all of the model.

        Args:
          mesh: devices to shard them over.
          step: see `load`.
          dtype: of the result; by default that of training.
          number: of the checkpoint that `step` stands for, if that is known already.

        Returns:
          The number of the checkpoint that was read, and what it holds.

        Raises:
          UserError, DamagedError: see `load`.
        """
        split = self.trainable
        wanted = meshes.abstract_arrays(split.specs, mesh, dtype or split.dtype)
        number = saved_step(self.folder, step) if number is None else number
        with self.checkpoints() as checkpoints:
            older = [s for s in checkpoints.steps if s < number and step == "latest"]
            number, found = _read(checkpoints, [*older, number], {"params": wanted})
        return number, found["params"]


def find_run(run: str | Path, base: Base | None = None) -> FoundRun:
    """Finds a finished or running run; writes nothing.

    Args:
      run: its folder.
      base: its base model, if that is open already.

    Raises:
      UserError: there is no such run, or its base model has changed.
    """
    found = open_stored(run, base)
    fields = dataclasses.fields(found)
    return FoundRun(**{field.name: getattr(found, field.name) for field in fields})


def reopen(
    run: str | Path,
    mesh: Mesh | None = None,
    *,
    step: str = "latest",
    in_compute_dtype: bool = False,
) -> ReopenedRun:
    """Opens a finished or running run; writes nothing.

    Raises:
      UserError, DamagedError: see `find_run` and `FoundRun.load`.
    """
    return find_run(run).load(mesh, step=step, in_compute_dtype=in_compute_dtype)


def fitting_mesh(
    specs: Mapping[str, Any], devices: Sequence[Any], *, decodes: bool = True
) -> Mesh:
    """A mesh over as many of `devices` as the parameters divide over.

    Decoding reads every parameter for every token. A split over `tensor` lets each
    device read its own part, so `tensor` is as large as the shapes allow, and `fsdp`
    takes the rest. Whole rows are the other way round: `fsdp` splits them, too.

    Args:
      specs: `Spec`s of all parameters, in a (nested) dictionary.
      devices: of this process.
      decodes: whether the mesh is for decoding, and not for batches of rows.
    """
    total = len(devices)
    for count in (n for n in range(total, 1, -1) if total % n == 0):
        for tensor in sorted(meshes.divisors(count), reverse=decodes):
            sizes = MeshConfig(data=1, fsdp=count // tensor, tensor=tensor)
            try:
                mesh = meshes.make_mesh(sizes, devices[:count])
                meshes.shardings(specs, mesh)
            except UserError:  # These sizes do not fit the shapes or the network.
                continue
            logging.info("reopen: %d of %d devices, tensor=%d", count, total, tensor)
            return mesh
    return meshes.make_mesh(MeshConfig(data=1), devices[:1])


def shared_mesh(
    specs: Mapping[str, Any], devices: Sequence[Any], *, decodes: bool = True
) -> Mesh:
    """The `fitting_mesh` of `devices`, which needs every process that has one of them.

    Raises:
      UserError: a process would hold nothing.
    """
    mesh = fitting_mesh(specs, devices, decodes=decodes)
    used, wanted = ({x.process_index for x in y} for y in (mesh.devices.flat, devices))
    if used != wanted:
        raise UserError(
            f"the model divides over {mesh.size} of {len(devices)} devices, so "
            f"{len(wanted - used)} of {len(wanted)} processes would hold nothing of "
            f"it: start {len(used)}"
        )
    return mesh


def _read(
    checkpoints: Checkpointer, steps: Sequence[int], wanted: Params
) -> tuple[int, Params]:
    """Reads the last of `steps` that can be used, with a warning for each other one.

    Returns:
      Its number, and what it holds of `wanted`.
    """
    *older, newest = steps
    try:
        return newest, checkpoints.restore_part(newest, wanted)
    except DamagedError as error:
        if not older:
            raise
        logging.warning("step %d is opened instead: %s", older[-1], error)
    return _read(checkpoints, older, wanted)
