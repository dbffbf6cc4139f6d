"""The models of an evaluation: runs at their steps, and the base of the first."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from research.config.knobs import changed
from research.core.errors import UserError
from research.formats.load_parameters import load_base, load_frozen
from research.models.make_model import model_of_run
from research.models.transformer import Model
from research.runs.answering.found_adapters import FoundFolder, open_folder
from research.runs.answering.run_addresses import BASE, RunAddress, run_addresses
from research.runs.lineage.base_of_run import NoTensors, RunTensors
from research.runs.lineage.start_pins import saved_step
from research.runs.phase_timer import PhaseTimer
from research.runs.reopen import FoundRun, find_run, fitting_mesh
from research.runs.run_history import History

Params = dict[str, Any]
TUNED = "tuned"  # The name of a single run.
# How a model reads rows. All else about them is that of the first run.
OF_MODEL = ("template", "template_args", "system", "seq_len", "overlength")


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A run at one step, or the base model that it began from.

    Attributes:
      name: in tables and files.
      run: the run, or an adapter of PEFT.
      step: the checkpoint, 0 of an adapter; None: the base model of `run`.
      identity: sha256 of the weights.
    """

    name: str
    run: FoundRun | FoundFolder
    step: int | None
    identity: str

    @property
    def address(self) -> str:
        """By which `open_for_answering` finds it."""
        folder = str(self.run.folder)
        return folder if isinstance(self.run, FoundFolder) else f"{folder}@{self.step}"

    @property
    def unfinished(self) -> str:
        """A sentence if the run has not ended; empty otherwise, or for a base model."""
        run = self.run
        if isinstance(run, FoundFolder):
            return ""
        planned = History(run.folder.history, PhaseTimer()).planned_steps
        last = planned or run.config.steps
        if self.step is None or self.step >= last or run.folder.is_complete:
            return ""
        return f"{run.folder} is not finished: step {self.step} of {last} is evaluated"

    @property
    def is_adapted(self) -> bool:
        """Whether it is a base model, or adapters to it."""
        return bool(self.run.trainable.frozen_specs)

    @property
    def shares_base(self) -> bool:
        """Whether it answers beside others over one base in memory."""
        return self.is_adapted and (self.step is None or self.run.config.is_adapter)

    @property
    def base_in_memory(self) -> tuple[Any, ...]:
        """Models for which this is equal can share their base in memory."""
        run = self.run
        if not self.shares_base:
            return (str(run.folder), self.step)
        return (
            run.base.fingerprint,
            run.base.tokenizer.fingerprint,
            repr(dataclasses.replace(run.config.model, init_from="")),
            str(run.trainable.frozen_dtype),
        )


@dataclasses.dataclass(frozen=True)
class ModelSet:
    """The models of an evaluation.

    Attributes:
      models: the baseline first, if there are several.
      target: the run that was named first: its rows are evaluated.
      baseline: the name of that with which all others are compared; "" for one alone.
    """

    models: tuple[EvaluatedModel, ...]
    target: EvaluatedModel
    baseline: str = ""

    @property
    def place(self) -> Path:
        """The folder that gets the results: that of the run; of an adapter, this one.

        The folder of an adapter may be in a cache, or be an export.
        """
        run = self.target.run
        return Path() if isinstance(run, FoundFolder) else run.folder.path

    def config_for(self, model: EvaluatedModel, changes: Mapping[str, Any]) -> Any:
        """The config by which `model` reads the rows: that of the target, `changes`
        of the user included, with the template and length that the model has.
        """
        config = changed(self.target.run.config, changes, "--config")
        own = {name: getattr(model.run.config.data, name) for name in OF_MODEL}
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **own))


def find_models(
    runs: Sequence[str], against: str = "", step: str = "latest", model: str = ""
) -> ModelSet:
    """Finds runs and what they are compared with; no parameter is read.

    Args:
      runs: `RUN`, `RUN@STEP`, folders of runs, or adapters of PEFT.
      against: `base`, another run, or "": the base of the first run if it has one,
        otherwise the first run.
      step: of each run that is named without one.
      model: the base of all adapters of PEFT; "": those that they name.

    Raises:
      UserError: a run or checkpoint is absent or named twice, or there is no base
        model.
    """
    addresses = run_addresses(runs, with_folders=True)
    places = [(x.folder, x.step) for x in addresses]
    if against not in ("", BASE):
        [other, *more] = run_addresses([against], "--against", with_folders=True)
        if more:
            raise UserError(f"--against={against} holds {1 + len(more)} runs: name one")
        if (other.folder, other.step) in places:
            if len(places) == 1:
                raise UserError(
                    f"--run and --against both name {against}, which compares it with "
                    "itself: drop --against, or name another run or step (RUN@STEP)"
                )
            first = places.index((other.folder, other.step))
            addresses.insert(0, addresses.pop(first))
        else:
            addresses = run_addresses([against, *runs], with_folders=True)
    if model and not any(x.is_folder for x in addresses):
        raise UserError(
            f"--model={model} is the base of adapters of PEFT, and --run names none: "
            "drop --model, as a run knows its base"
        )
    found = [_found(x, step, model) for x in addresses]
    named_first = [(x.folder, x.step) for x in addresses].index(places[0])
    _require_different(found)
    kinds = {x.run.config.data.kind for x in found}
    if len(kinds) > 1:
        raise UserError(
            f"--run names runs of different kinds ({', '.join(sorted(kinds))}), which "
            "share no rows: evaluate them one by one"
        )
    if len(found) == 1:
        found = [dataclasses.replace(found[0], name=TUNED)]
    if against in ("", BASE):
        first = found[0].run
        missing = _no_base(first)
        if not missing:
            base = EvaluatedModel(BASE, first, None, first.base.fingerprint)
            return ModelSet((base, *found), found[named_first], BASE)
        if against:
            raise UserError(f"--against=base: {first.folder} {missing}; name a run")
    baseline = found[0].name if len(found) > 1 else ""
    return ModelSet(tuple(found), found[named_first], baseline)


def require_held_out(found: ModelSet) -> None:
    """Raises UserError: the model that was named first holds no rows out."""
    if isinstance(found.target.run, FoundFolder):
        raise UserError(
            f"--run={found.target.run.folder} is an adapter of PEFT, which holds no "
            "rows out: name rows with --data=FILE"
        )


def _found(address: RunAddress, step: str, model: str) -> EvaluatedModel:
    if address.is_folder:
        if step != "latest":
            raise UserError(
                f"--run={address.folder} is an adapter of PEFT, which has no steps: "
                "drop --step"
            )
        folder = open_folder(str(address.folder), model)
        parts = f"{folder.base.fingerprint} {folder.identity}"
        identity = hashlib.sha256(parts.encode()).hexdigest()
        return EvaluatedModel(address.name, folder, 0, identity)
    run = find_run(address.folder)
    number = saved_step(run.folder, step if address.step == "latest" else address.step)
    found = EvaluatedModel(
        address.name, run, number, RunTensors(run, number).fingerprint
    )
    if found.unfinished:
        logging.warning("%s", found.unfinished)
    return found


def _require_different(found: Sequence[EvaluatedModel]) -> None:
    names: dict[tuple[Path, int | None], str] = {}
    for each in found:
        folder = each.run.folder.path
        first = names.setdefault((folder.resolve(), each.step), each.name)
        if first != each.name:
            raise UserError(
                f"{first} and {each.name} are both step {each.step} of {folder}: name "
                "this checkpoint once"
            )


def _no_base(run: FoundRun | FoundFolder) -> str:
    """Why there is no base model to compare with; empty if there is one."""
    if run.base.tensors is None:
        return "began with random weights, so there is no base model"
    if isinstance(run.base.tensors, NoTensors):
        return "has lost its base model"
    return ""


@dataclasses.dataclass(frozen=True)
class OpenModels:
    """Models in memory that share a decoder: their parameters by name."""

    config: Any
    model: Model
    mesh: Mesh
    weights: dict[str, Params]


def open_whole(
    models: Sequence[EvaluatedModel],
) -> list[tuple[list[str], Callable[[], OpenModels]]]:
    """For models whose rows are read whole: names, and what opens them together.

    A base model and the first adapters over it are open together. Whoever keeps none
    that is open has one base in memory at a time.
    """
    base = next((x for x in models if x.step is None), None)
    found = []
    for each in models:
        if each.step is None:
            if not each.is_adapted:
                opens = functools.partial(_open_base, each, each.run.trainable.dtype)
                found.append(([each.name], opens))
            continue
        below = base if base and base.is_adapted and base.run is each.run else None
        names = [below.name, each.name] if below else [each.name]
        found.append((names, functools.partial(_open_run, each, below)))
    return found


def open_for_answers(model: EvaluatedModel) -> OpenModels:
    """A model that shares its base with no other, in the dtype of its computation."""
    if model.step is None:
        dtype = jax.numpy.dtype(model.run.config.model.dtype)
        return _open_base(model, dtype, decodes=True)
    run = model.run.load(step=str(model.step), in_compute_dtype=True)
    return OpenModels(run.config, run.model, run.mesh, {model.name: run.weights})


def _open_run(model: EvaluatedModel, base: EvaluatedModel | None) -> OpenModels:
    run = model.run.load(step=str(model.step), decodes=False)
    weights = {base.name: run.frozen} if base else {}
    weights[model.name] = run.weights
    return OpenModels(run.config, run.model, run.mesh, weights)


def _open_base(
    model: EvaluatedModel, dtype: Any, *, decodes: bool = False
) -> OpenModels:
    config, base = model.run.config, model.run.base
    mesh = fitting_mesh(model.run.specs, jax.local_devices(), decodes=decodes)
    made = model_of_run(config.model, config.data, base.architecture, mesh)
    if model.is_adapted:
        split, seed = model.run.trainable, config.seed
        weights = load_frozen(base, made, mesh, split, seed)
    else:
        weights = load_base(base, made, mesh, dtype, seed=0)
    return OpenModels(config, made, mesh, {model.name: weights})
