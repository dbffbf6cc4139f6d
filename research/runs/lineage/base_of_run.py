"""The base model of a run. It may be another run at one step, of which nothing was
exported: adapters are added to their weights in memory.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.run_identity import BASE_RUN, BASE_STEP, BASE_SUM
from research.checkpoints.stored_steps import seal_of
from research.config.knob_groups import MeshConfig, ModelConfig, RuntimeConfig
from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.local_paths import split_step
from research.formats.base_model import Base, open_architecture
from research.formats.huggingface.huggingface_export import fetch
from research.formats.huggingface.huggingface_weights import read_hf_config
from research.formats.kept_tensors import kept_kinds
from research.formats.load_parameters import check_tensors, load_frozen_param
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor, used
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.runs.lineage.start_pins import saved_step
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RUN, RunDir
from research.runs.run_history import History
from research.tasks import task_registry
from research.tokenize import tokenizer as tokenizers
from research.weights import trainable
from research.weights.adapters.adapter_kind import with_own_patterns

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """A run on disk, with its base model open and no parameter read.

    Attributes:
      folder: of the run.
      config: of the run, with the choices of this machine; see `for_this_machine`.
      base: the base model that training began with.
      trainable: the split into trained and frozen parameters.
      identity: as a checkpoint of the run must have it.
    """

    folder: RunDir
    config: Config
    base: Base
    trainable: trainable.Trainable
    identity: dict[str, str]

    @functools.cached_property
    def specs(self) -> Mapping[str, Any]:
        """Descriptions of all parameters of the model."""
        return Model(self.base.architecture).specs

    def checkpoints(self) -> Checkpointer:
        """The checkpoints, to read only; every process must call it."""
        return Checkpointer(
            self.folder.checkpoints,
            self.config.checkpoint,
            self.identity,
            accept=set(History(self.folder.history, PhaseTimer()).accepted),
            read_only=True,
        )


def open_stored(run: str | Path, base: Base | None = None) -> StoredRun:
    """Opens a run and its base model, for this machine; `base` is open already.

    Raises:
      UserError: there is no such run, or its base model is gone or has changed.
    """
    folder = RunDir(run)
    config = for_this_machine(folder.config())
    base = base or open_start(config, folder)
    identity = folder.identity() | {
        "base model": base.fingerprint,
        "tokenizer": base.tokenizer.fingerprint,
    }
    folder.check_identity(identity)
    # Its folder alone names the run that it starts from; the weights of that one are
    # the base model, whose fingerprint is compared.
    for part in (BASE_RUN, BASE_STEP, BASE_SUM):
        identity.pop(part, None)
    specs = Model(base.architecture).specs
    kept = kept_kinds(config.model.quantize, base.tensors, base.architecture, specs)
    split = trainable.make(config.trainable, config.model, config.lora, specs, kept)
    return StoredRun(folder, config, base, split, identity)


def for_this_machine(config: Config) -> Config:
    """The config without the choices that suit only the machine that trained.

    The kernel is chosen anew, nothing is offloaded or recomputed, and the compilation
    cache is that of this user.
    """
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention="auto", remat="none"),
        mesh=MeshConfig(),
        runtime=RuntimeConfig(distributed=False),
    )


def open_start(config: Config, folder: RunDir) -> Base:
    """Opens the base model that the run in `folder` starts from, or started from.

    A run that trains all its parameters needs no base model to resume: the shape and
    the tokenizer that it keeps stand in for one that is gone.

    Raises:
      UserError: the base model or tokenizer does not exist or does not fit.
    """
    start, step = split_step(config.model.init_from)
    try:
        if step:
            return open_step(start, step)
        return task_registry.open_start(config, folder.own_tokenizer)
    except UserError as error:
        if not _began_with(folder, config.model.init_from):
            raise
        if config.trainable == "full" and (folder.tokenizer / "config.json").is_file():
            logging.warning(
                "%s; all parameters are in the run's own checkpoints", error
            )
            return _kept_base(config.model.init_from, folder, str(error))
        known = folder.identity()
        of_run = f" (step {step} of run {known[BASE_RUN]})" if BASE_RUN in known else ""
        raise UserError(
            f"{folder} holds adapters to the weights of {config.model.init_from}"
            f"{of_run}, which cannot be read: {error}; bring them back, or start "
            "the run once from another copy, such as an export of that step: python -m "
            f"research.train --config={shlex.quote(str(folder))} "
            "--config.model.init_from=FOLDER "
            "--config.accept=\"('model.init_from', 'base model')\""
        ) from error


def start_architecture(config: Config) -> Architecture:
    """The shape of the model that `open_start` opens, without weights and tokenizer.

    Raises:
      UserError: it is absent or damaged, or no family of models covers it.
    """
    place = split_step(config.model.init_from)[0]
    run = None if "://" in place else RunDir(place)
    if not run or not run.is_run:
        return open_architecture(config.model.init_from, config.data.hub_timeout)
    if (run.tokenizer / "config.json").is_file():
        return read_hf_config(run.tokenizer)
    return open_stored(place).base.architecture  # A run of an older version.


def _began_with(folder: RunDir, start: str) -> bool:
    """Whether the run in `folder`, if it exists, began with the model `start`."""
    written = folder.config().model.init_from if folder.exists else ""
    (known, before), (place, step) = split_step(written), split_step(start)
    same = known == place or os.path.abspath(known) == os.path.abspath(place)
    return bool(written) and same and before == step


def _kept_base(name: str, folder: RunDir, problem: str) -> Base:
    """The base model of a run in `folder` without its weights."""
    identity = folder.identity()
    architecture = read_hf_config(folder.tokenizer)
    tokenizer = tokenizers.from_folder(folder.tokenizer).within(architecture.vocab)
    # It is the same one in another form: a GGUF file holds it in a form of its own.
    tokenizer.fingerprint = identity["tokenizer"]
    origin = {x: identity[x] for x in (BASE_RUN, BASE_STEP, BASE_SUM) if x in identity}
    tensors = NoTensors(name, identity["base model"], problem)
    return Base(name, architecture, tokenizer, tensors, origin=origin)


def open_step(start: str, step: str) -> Base:
    """The model of the run `start` at `step`, with the tokenizer that it exports.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    if not RunDir(start).is_run:
        raise UserError(f"base model {start}@{step}: {start} is no run directory")
    run = open_stored(start)
    tensors = RunTensors(run, saved_step(run.folder, step))
    return Base(
        f"{start}@{tensors.step}",
        run.base.architecture,
        task_registry.exported_tokenizer(run.config, run.base),
        tensors,
        run.base.licence,
        tensors.origin,
    )


def as_written(model: ModelConfig) -> str:
    """`ModelConfig.frozen_form` in the run's own spelling.

    Another spelling of the same is no other run, but a fingerprint must never change.
    """
    others = ", ".join(model.quantize_paths)
    return f"{model.quantize} ({others})" if others else model.quantize


class NoTensors:
    """The tensors of a base model that is gone; whoever reads one gets `problem`."""

    def __init__(self, place: str, fingerprint: str, problem: str):
        self.place, self.fingerprint = place, fingerprint
        self._problem = problem

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        raise UserError(self._problem)

    def read(self, name: str) -> np.ndarray:
        raise UserError(self._problem)

    def layout(self, family: ModelFamily) -> tuple[StoredTensor, ...]:
        return family.hf_tensors

    def on(self, mesh: Mesh) -> "NoTensors":
        return self


class RunTensors:
    """The model of a run at one step, as its export in float32 would hold it.

    One parameter at a time lies in memory, over the devices of a mesh, and one layer of
    it on each host.
    """

    def __init__(self, run: StoredRun, step: int, mesh: Mesh | None = None):
        self.step, self.place = step, f"{run.folder}@{step}"
        self._run, self._mesh = run, mesh
        self._tensors = {
            name: (stored, index)
            for stored in used(family_of(run.base.architecture).hf_tensors, run.specs)
            for name, index in stored.names(run.specs)
        }
        self._checked = False
        self._near: tuple[StoredTensor, Params] | None = None

    @functools.cached_property
    def origin(self) -> dict[str, str]:
        """Parts of an identity: the run, the step and its checkpoint."""
        return {
            BASE_RUN: self._run.folder.origin().get(RUN, ""),
            BASE_STEP: str(self.step),
            BASE_SUM: seal_of(self._run.folder.checkpoints / str(self.step)),
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the checkpoint's checksums, and of how adapters are added."""
        model, lora = self._run.config.model, flat(self._run.config.lora)
        plain = flat(type(self._run.config.lora)())
        parts = {
            **self.origin,
            # "plain" is what older versions call it.
            "dtypes": [
                model.dtype,
                model.param_dtype,
                "plain" if model.quantize == "none" else as_written(model),
            ],
            # A knob of a later version is at its default here. Where the adapters
            # began is no part of what they are.
            "lora": {
                k: v for k, v in lora.items() if v != plain[k] and k != "init_from"
            },
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def on(self, mesh: Mesh) -> "RunTensors":
        return RunTensors(self._run, self.step, mesh)

    def layout(self, family: ModelFamily) -> tuple[StoredTensor, ...]:
        return family.hf_tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        specs = self._run.specs
        return {name: x.shape(specs) for name, (x, _) in self._tensors.items()}

    def kind(self, name: str) -> str:
        return "float32"

    def read(self, name: str) -> np.ndarray:
        stored, index = self._tensors[name]
        if self._near is None or self._near[0] is not stored:
            self._near = None  # Room for the next one.
            self._near = stored, {path: self._load(path) for path in stored.paths}
        values = [fetch(self._near[1][path], index) for path in stored.paths]
        return stored.pack(values, self._run.specs)

    @functools.cached_property
    def _base(self) -> Any:
        """The tensors under the adapters."""
        tensors = self._run.base.tensors.on(self._mesh)
        check_tensors(tensors, Model(self._run.base.architecture))
        return tensors

    @functools.cached_property
    def _adapters(self) -> Params:
        split = self._run.trainable
        return self._restore(split.adapters(split.specs))

    def _restore(self, specs: Mapping[str, Any]) -> Params:
        """Trained parameters over the mesh; the first read checks the checkpoint."""
        wanted = meshes.abstract_arrays(specs, self._mesh, self._run.trainable.dtype)
        with self._run.checkpoints() as checkpoints:
            found = checkpoints.restore_part(
                self.step, {"params": wanted}, check=not self._checked
            )
        self._checked = True
        return found["params"]

    def _load(self, path: str) -> Any:
        """One parameter over the mesh, with its adapter attached."""
        split, specs, mesh = self._run.trainable, self._run.specs, self._mesh
        if not split.frozen_specs or path in split.full:
            return self._restore({path: specs[path]})[path]
        adapters = self._adapters
        family = family_of(self._run.base.architecture)
        stored = load_frozen_param(self._base, family, path, specs, split, mesh)
        if path not in adapters:
            return stored
        ranks = {p: split.kind.rank(factors) for p, factors in adapters.items()}
        lora = with_own_patterns(self._run.config.lora, specs)
        settings = split.kind.settings(ranks, lora)
        own = {path: adapters[path]}
        return split.kind.attach({path: stored}, own, settings)[path]
