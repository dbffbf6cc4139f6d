"""One base model with room for the adapters of many runs, for programs that answer.

    opened = open_for_answering(["runs/a", "runs/sweeps/rank"])
    for address in opened.runs:
        served, row = opened.read(address)       # the engine writes `row` into the bank

Whether a run was trained on this very base is checked before any weight is read.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.checkpoints.stored_steps import seal_of
from research.config.knob_groups import ModelConfig
from research.core.errors import UserError
from research.formats.base_model import Base
from research.formats.load_parameters import load_base, load_frozen
from research.models.make_model import make_model
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.runs.answering.found_adapters import (
    FoundFolder,
    base_of_folder,
    find_adapters,
    same_numbers,
    weights_text,
    why_base,
)
from research.runs.answering.int8_base import in_form
from research.runs.answering.named_model import open_named, prompts_of
from research.runs.answering.run_addresses import (
    BASE,
    RunAddress,
    run_addresses,
)
from research.runs.answering.weight_forms import PLAIN
from research.runs.lineage.base_of_run import RunTensors
from research.runs.lineage.start_pins import saved_step
from research.runs.reopen import FoundRun, find_run, shared_mesh
from research.runs.run_directory import RunDir
from research.tasks.pretraining import PlainFormat
from research.tasks.task_protocol import PromptFormat
from research.tokenize.chat_template import ChatFormat
from research.weights.adapters import serving_bank
from research.weights.parameter_spec import Spec
from research.weights.representations.adapter_bank import AdapterBank

Params = dict[str, Any]
USUAL_RANK = 16


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model that answers under one name.

    Attributes:
      name: by which clients ask for it.
      root: the folder of the run, or the name of the model without one.
      parent: the name of the model that it adapts; "" for the base model itself.
      address: of the run; None for a model without one.
      step: the checkpoint that was read; 0 without a run.
      identity: sha256 of what was read: of the base model, or of the checkpoint and of
        how its adapters are added.
      prompts: how its prompts become ids, as in training.
      system: the system text of training, or "".
      newest: the checkpoint that the address stood for, by its checksums. It differs
        from the one that was read where that was damaged.
    """

    name: str
    root: str
    parent: str
    address: RunAddress | None
    step: int
    identity: str
    prompts: PromptFormat
    system: str = ""
    newest: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether a prompt is a conversation, and not a text to continue."""
        return isinstance(self.prompts, ChatFormat)

    def has_changed(self) -> bool:
        """Whether its address stands for another checkpoint now.

        A checkpoint appears whole, under its final name, so none is seen half-written.
        """
        if not self.address or self.address.is_folder:
            return False
        try:
            now = self.address.now()
            if now.step.isdecimal():
                return now != self.address
            return newest_step(now)[1] != self.newest
        except UserError:  # None is there while the trainer exchanges them.
            return False


@dataclasses.dataclass(frozen=True)
class Answering:
    """A base model that is open, and runs whose adapters fit it.

    Attributes:
      base: the model under all adapters, with the tokenizer of all.
      model: the decoder on `mesh`.
      mesh: holds the parameters.
      params: with an empty bank; see `serving_bank`. Whoever writes a row owns it.
      served_base: the model without an adapter.
      runs: of adapters, as the user named them; none is read yet.
      weights: the form of the base, see `in_form`.
      frozen_form: of the base for its runs, see `ModelConfig.frozen_form`.
    """

    base: Base
    model: Model
    mesh: Mesh
    params: Params
    served_base: ServedModel
    runs: tuple[RunAddress, ...]
    weights: str = PLAIN
    frozen_form: str = "none"

    def read(
        self, address: RunAddress, number: int | None = None
    ) -> tuple[ServedModel, serving_bank.Row]:
        """Reads the adapters of a run; nothing that answers is changed.

        Args:
          address: of the run.
          number: of the checkpoint that the address stands for, if that is known.

        Raises:
          UserError: there is no such run or checkpoint, it was trained on another base,
            or the bank has no room for its ranks and targets.
          DamagedError: no checkpoint can be read.
        """
        found = find_adapters(address, self.base, self.frozen_form)
        if not same_numbers(found.config.model.frozen_form, self.frozen_form):
            logging.warning(
                "%s was trained over %s and answers over %s here: its answers may "
                "differ from those of its report",
                address.name,
                weights_text(found.config.model.frozen_form),
                weights_text(self.frozen_form),
            )
        if isinstance(found, FoundFolder):
            step, adapters, newest = 0, found.read(self.mesh), ""
            identity = found.identity
        else:
            step, adapters, newest = self._restored(found, address, number)
            identity = RunTensors(found, step).fingerprint
        # Only shapes are needed: the engine may have donated the arrays since.
        frozen = {
            path: leaf.base if isinstance(leaf, AdapterBank) else leaf
            for path, leaf in self.params.items()
        }
        adapted = found.trainable.forward(adapters, frozen, None)
        changed = {path: adapted[path] for path in adapters}
        row = serving_bank.bank_row(self.params, changed)
        parent = self.served_base.name
        return _served(found, address, parent, step, identity, newest), row

    def _restored(
        self, run: FoundRun, address: RunAddress, number: int | None
    ) -> tuple[int, Params, str]:
        """The step and the adapters of a run, and the checkpoint that is its newest."""
        number, newest = newest_step(address, number)
        try:
            step, adapters = run.restored(self.mesh, address.step, number=number)
        except (OSError, ValueError):
            if (run.folder.checkpoints / str(number)).is_dir():
                raise
            # Its trainer has removed it meanwhile, and saved another one before.
            step, adapters = run.restored(self.mesh, address.step)
        if run.config.model.dtype != (own := self.model.options.dtype.name):
            logging.warning(
                "%s was trained in %s and answers in %s here: its answers may differ "
                "from those of its report",
                address.name,
                run.config.model.dtype,
                own,
            )
        return step, adapters, newest

    def reread(self, address: RunAddress, number: int | None = None) -> "Answering":
        """The run whose whole model is the base, at the step it has now, beside this.

        Args:
          address: of the run; an alias may stand for another one by now.
          number: of the checkpoint that the address stands for, if that is known.

        Raises:
          UserError, DamagedError: it cannot be read, or is a model of other shapes.
        """
        run, own = find_run(address.folder), self.base
        if (
            run.config.is_adapter
            or run.base.architecture != own.architecture
            or run.base.tokenizer.fingerprint != own.tokenizer.fingerprint
        ):
            raise UserError(
                f"{address.folder} is a model of another shape, tokenizer or kind than "
                f"{self.served_base.root}: start the server again to serve it"
            )
        found = _open_full_run(address, self.mesh, number)
        base = dataclasses.replace(found.base, tokenizer=self.base.tokenizer)
        found = dataclasses.replace(found, base=base, model=self.model)
        return _in_form(found, self.weights)


def open_for_answering(
    runs: Sequence[str] = (),
    *,
    model: str = "",
    mesh: Mesh | None = None,
    adapters: int = 0,
    spare: int = 0,
    rank: int = 0,
    weights: str = PLAIN,
    devices: Sequence[Any] = (),
) -> Answering:
    """Opens the one base model of several runs, or a model without a run.

    Args:
      runs: `RUN`, `RUN@STEP`, folders of runs, or adapter folders of PEFT. A run that
        trained all or some of its parameters whole is a base model itself, and stands
        alone or with adapters.
      model: the base model, as `config.model.init_from` names it; by default that of
        the first run.
      mesh: devices for the parameters; by default those of `devices` that fit.
      adapters: how many have room at once, at least as many as there are runs. Room
        that is not used slows every answer down. With 0 and no run there is no bank.
      spare: rows of the bank beyond these, where a newer checkpoint of a run is put
        while the older one still answers.
      rank: the largest rank that has room; those of `runs` have room anyway, and
        without runs `USUAL_RANK`.
      weights: the form of the base, see `in_form`.
      devices: by default those of this process; all processes of `devices` call this.

    Raises:
      UserError: a run or model is absent, bases differ, or a model does not divide.
    """
    addresses = run_addresses(runs, with_folders=True)
    if not model and not addresses:
        raise UserError("name a run with --run=RUN_DIR, or a model with --model=")
    of_runs = [x for x in addresses if not x.is_folder]
    full = [x for x in of_runs if not RunDir(x.folder).config().is_adapter]
    if full and (model or len(full) > 1):
        raise UserError(
            f"{why_base(RunDir(full[-1].folder))}, and one base is served at a time: "
            f"serve it without {'--model' if model else full[0].folder}"
        )
    others = tuple(x for x in addresses if x not in full)
    devices = devices or jax.local_devices()
    if full:
        found_mesh = mesh or shared_mesh(find_run(full[0].folder).specs, devices)
        opened = _open_full_run(full[0], found_mesh)
    else:
        opened = _open_base(model, others, mesh, devices)
    found = [find_adapters(x, opened.base, opened.frozen_form) for x in others]
    opened = _in_form(opened, weights, of_runs[0].folder if of_runs else None)
    count = max(adapters, len(found))
    params = _with_bank(opened, found, count + spare, rank) if count else opened.params
    return dataclasses.replace(opened, runs=others, params=params)


def newest_step(address: RunAddress, number: int | None = None) -> tuple[int, str]:
    """The step that an address stands for now, and its checksums.

    Raises:
      UserError: there is none.
    """
    if address.is_folder:
        return 0, ""
    folder = RunDir(address.folder)
    number = saved_step(folder, address.step) if number is None else number
    return number, f"{number} {seal_of(folder.checkpoints / str(number))}"


def _served(
    run: FoundRun | FoundFolder,
    address: RunAddress,
    parent: str,
    step: int,
    identity: str,
    newest: str,
) -> ServedModel:
    folder = str(address.folder)
    return ServedModel(
        address.name, folder, parent, address, step, identity, run.prompts,
        run.system, newest,
    )  # fmt: skip


def _in_form(opened: Answering, weights: str, run: Path | None = None) -> Answering:
    """`opened` with its base in the form that `--weights` names."""
    if run is None and opened.served_base.address:
        run = opened.served_base.address.folder
    params = in_form(
        weights, opened.params, opened.model, opened.mesh, run, opened.base.tokenizer
    )
    return dataclasses.replace(opened, params=params, weights=weights)


def _open_full_run(
    address: RunAddress, mesh: Mesh, number: int | None = None
) -> Answering:
    number, newest = newest_step(address, number)
    run = find_run(address.folder)
    loaded = run.load(mesh, step=address.step, in_compute_dtype=True, number=number)
    # Adapters to this step have it as the base in their identity.
    tensors = RunTensors(run, loaded.step)
    base = dataclasses.replace(run.base, name=str(address.folder), tensors=tensors)
    served = _served(run, address, "", loaded.step, base.fingerprint, newest)
    if number != loaded.step:
        logging.warning("%s is served at step %d", address.name, loaded.step)
    return Answering(base, loaded.model, loaded.mesh, loaded.weights, served, ())


def _open_base(
    name: str,
    runs: Sequence[RunAddress],
    mesh: Mesh | None,
    devices: Sequence[Any],
) -> Answering:
    of_runs = [] if name else [x for x in runs if not x.is_folder]
    first = find_run(of_runs[0].folder) if of_runs else None
    base = first.base if first else open_named(name or base_of_folder(runs[0].folder))
    config = first.config.model if first else ModelConfig()
    for address in runs:  # Before any weight is read.
        find_adapters(address, base, config.frozen_form)
    specs = Model(base.architecture).specs
    mesh = mesh or shared_mesh(specs, devices)
    model = make_model(
        config, base.architecture, mesh, length=base.architecture.max_position, rows=1
    )
    if first:
        params = load_frozen(base, model, mesh, first.trainable, first.config.seed)
    else:
        params = load_base(base, model, mesh, model.options.dtype, seed=0)
    prompts = prompts_of(base)
    if first and isinstance(prompts, PlainFormat):
        prompts = first.prompts_with("")  # So that it can be compared with the runs.
    served = ServedModel(BASE, base.name, "", None, 0, base.fingerprint, prompts)
    form = config.frozen_form
    return Answering(base, model, mesh, params, served, (), frozen_form=form)


def _with_bank(
    opened: Answering,
    runs: Sequence[FoundRun | FoundFolder],
    adapters: int,
    rank: int,
) -> Params:
    """The parameters with a bank for `adapters` beside the base."""
    targets: set[str] = set()
    gains = any(run.trainable.kind.has_gains for run in runs)
    for run in runs:
        kind, specs = run.trainable.kind, run.trainable.specs
        targets |= specs.keys()
        rank = max(rank, *(kind.update_rank(factors) for factors in specs.values()))
    rank = rank or USUAL_RANK
    specs = opened.model.specs
    layers = {path for path, spec in specs.items() if spec.n_in and spec.stacked}

    def zeros(spec: Spec, dtype: Any) -> jax.Array:
        sharding = meshes.shardings({"bank": spec}, opened.mesh)["bank"]
        return jax.make_array_from_callback(
            spec.shape, sharding, lambda part: np.zeros(_size(spec.shape, part), dtype)
        )

    return serving_bank.bank(
        opened.params,
        specs,
        adapters + 1,
        rank,
        paths=targets | layers,
        gains=gains,
        dtype=opened.model.options.dtype,
        zeros=zeros,
    )


def _size(shape: tuple[int, ...], part: tuple[slice, ...]) -> list[int]:
    return [len(range(*s.indices(n))) for s, n in zip(part, shape, strict=True)]
