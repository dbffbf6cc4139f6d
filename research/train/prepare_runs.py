"""From run directories to runs that are ready to train, and the claim to each folder.

Everything is opened, loaded and examined before anything is written.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.disk_space import require_room
from research.checkpoints.run_identity import Identity
from research.checkpoints.stored_steps import step_folders
from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError
from research.engine.text_generation import SlotDecoders
from research.formats.base_model import Base
from research.formats.huggingface.huggingface_export import save_settings
from research.models.transformer import Model
from research.parallel import agreement, mesh
from research.report import terminal
from research.runs import provenance
from research.runs.lineage.base_of_run import open_start
from research.runs.lineage.exported_run import refuse_other_step
from research.runs.lineage.start_pins import keep_base_step
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.tasks import epochs, task_registry
from research.tasks.task_protocol import Task
from research.train import doctor
from research.train.metrics.held_out_answers import HeldOutAnswers, check_best_by
from research.train.programs import pack_arrays
from research.train.programs.device_batches import first_batches
from research.train.step import train_step
from research.train.step.definition_from_config import (
    load_start,
    make_step_definition,
    require_new_start,
)
from research.train.step.schedules import make_schedule
from research.train.training_run import TrainingRun
from research.weights.trainable import Trainable

# Knobs that name a place of one machine, or the process itself.
OWN_KNOBS = {
    *("runtime.process_id", "runtime.coordinator_address"),
    *("runtime.compilation_cache", "text.cache_dir"),
}
# Seconds in which a new file must be seen by all: network disks keep names for a while.
DISK_PATIENCE = 60.0


@dataclasses.dataclass
class OpenedFolder:
    """A run directory and its config, before anything is loaded.

    Attributes:
      changed: accepted differences from the existing run, `old -> new` by name.
    """

    config: Config
    folder: RunDir
    changed: dict[str, str]
    history: History | None = None


def facts_of_start(
    configs: Sequence[Config], opened: Sequence[OpenedFolder]
) -> dict[str, str]:
    """The facts that all processes of a job must share before anything is loaded.

    Args:
      configs: of all its runs.
      opened: those that are not complete.
    """
    found = provenance.shared_parts()
    state = {
        each.config.run_dir: "unfinished" if each.folder.exists else "new"
        for each in opened
    }
    for number, config in enumerate(configs, 1):
        run = f"run {number}: " if len(configs) > 1 else ""
        knobs = {k: v for k, v in flat(config).items() if k not in OWN_KNOBS}
        found |= {f"{run}config.{name}": repr(value) for name, value in knobs.items()}
        found[f"{run}what is in {config.run_dir}"] = state.get(
            config.run_dir, "a complete run"
        )
    return found


def prepare(opened: Sequence[OpenedFolder], phases: PhaseTimer) -> list[TrainingRun]:
    """Opens, loads and examines everything; writes nothing into the run directories.

    The runs share one base model and mesh, and runs of one seed share their rows.
    """
    first = opened[0]
    for each in opened:
        check_best_by(each.config)
    base = agreement.together(
        lambda: _open_base(opened),
        lambda base: {
            "base model": base.fingerprint,
            "tokenizer": base.tokenizer.fingerprint,
        },
    )
    devices = mesh.make_mesh(first.config.mesh)
    wide = _union(opened, base)
    outputs = decoders = None
    loaded: dict[int, tuple[Task, HeldOutAnswers]] = {}
    runs: list[TrainingRun] = []
    for each in opened:
        config = each.config
        _require_fit(each, base, devices)
        if config.seed not in loaded:
            loaded[config.seed] = _load(config, base, phases)
        task, answers = loaded[config.seed]
        config = epochs.resolved(config, task.rows)
        objective = task_registry.make_objective(config, devices, len(task.groups))
        if not each.folder.exists:  # Runs of before may have begun so.
            unit = mesh.batch_shards(devices) * objective.rows_per_unit
            epochs.require_batch(config.data, task.rows, unit)
        definition = make_step_definition(config, base, devices, objective)
        state, frozen = _start(definition, each, base, runs, config, task)
        alike = _alike(config, definition, wide)
        outputs = outputs or doctor.make_outputs(definition)
        decoders = decoders or SlotDecoders(definition.model, devices)
        read = dataclasses.replace(definition, trainable=alike)
        examination = doctor.examine(
            base, read, state, frozen, task, config.lora, outputs
        )
        console = _shown(examination, is_first=not runs)
        runs.append(
            TrainingRun(
                config=config,
                folder=each.folder,
                base=base,
                task=task,
                definition=definition,
                alike=alike,
                decoders=decoders,
                state=state if isinstance(state.step, jax.Array) else None,
                frozen=frozen,
                examination=examination,
                console=console,
                phases=phases,
                history=each.history,
                answers=answers,
            )
        )
    return runs


def _require_fit(opened: OpenedFolder, base: Base, devices: Mesh) -> None:
    """Refuses a run that does not fit its mesh or base, before its data is read."""
    config = opened.config
    objective = task_registry.make_objective(config, devices)
    definition = make_step_definition(config, base, devices, objective)
    if not opened.folder.exists:
        require_new_start(config, base, definition)


def _open_base(opened: Sequence[OpenedFolder]) -> Base:
    """The base model of all runs, which can train together over it."""
    base = open_start(opened[0].config, opened[0].folder)
    _union(opened, base)
    return base


def _union(opened: Sequence[OpenedFolder], base: Base) -> pack_arrays.Union | None:
    """The room for the adapters of all runs; None for a run that trains alone."""
    if len(opened) == 1:
        return None
    specs = Model(base.architecture).specs
    return pack_arrays.union(specs, [each.config for each in opened])


def _alike(
    config: Config,
    definition: train_step.StepDefinition,
    wide: pack_arrays.Union | None,
) -> Trainable:
    """See `TrainingRun`; `wide` is the room for the adapters of all runs."""
    split, specs = definition.trainable, definition.model.specs
    if wide is None:
        return split
    return pack_arrays.alike(config, split, specs, definition.mesh, wide)


def _shown(examination: doctor.Examination, *, is_first: bool) -> Console:
    """Shows what the doctor has found, which may end the start; returns the console."""
    console = Console(quiet=jax.process_index() > 0 or not is_first)
    terminal.show_findings(console, examination.findings)
    terminal.show_preview(console, examination.preview)
    doctor.require_healthy(examination)
    return console


def _load(
    config: Config, base: Base, phases: PhaseTimer
) -> tuple[Task, HeldOutAnswers]:
    """The rows of a run, the same in all processes, and those that are answered."""
    task = agreement.together(
        functools.partial(task_registry.load_task, config, base),
        lambda task: {"data": f"{task.origin}, sha256 {task.sha256}"},
    )
    return task, HeldOutAnswers(task, base.tokenizer, config, phases.sign_of_life)


def _start(
    definition: train_step.StepDefinition,
    opened: OpenedFolder,
    base: Base,
    others: Sequence[TrainingRun],
    config: Config,
    task: Task,
) -> tuple[train_step.TrainState, dict[str, Any]]:
    """The state before the first step, and the frozen parameters.

    A checkpoint of a run that trains all parameters has them all: the base model is not
    read then, and may be gone. The state has only shapes until the checkpoint is read.
    """
    saved = agreement.of_first(bool(step_folders(opened.folder.checkpoints)))
    if saved and not definition.trainable.frozen_specs:
        return train_step.abstract_state(definition), {}
    frozen = others[0].frozen if others else None
    continued = None if saved else opened.config.lora
    rows = functools.partial(first_batches, config, definition, task)
    params, frozen = load_start(
        definition, base, frozen, continued, None if saved else rows
    )
    return train_step.jit_init(definition)(params), frozen


def claim(
    runs: Sequence[TrainingRun], opened: Sequence[OpenedFolder]
) -> list[Identity]:
    """Claims all run directories in process 0; returns the identities of the runs.

    The others make sure that they see the same folders.

    Raises:
      UserError: a folder belongs to other data, the disk has no room, or the processes
        have different disks.
    """
    identities = agreement.together(
        lambda: [_claim(run, each) for run, each in zip(runs, opened, strict=True)]
    )
    holders = [agreement.of_first(run.folder.holder) for run in runs]
    agreement.together(
        lambda: [_find(run.folder, x) for run, x in zip(runs, holders, strict=True)]
    )
    return identities


def _find(folder: RunDir, holder: str) -> None:
    """Waits until the lock of the first process is seen in `folder`."""
    deadline = time.monotonic() + DISK_PATIENCE
    while folder.holder != holder:
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} is not the folder that process 0 trains in ({holder}): it "
                f"was locked by {folder.holder or 'nobody'}; name a folder in "
                "config.run_dir that all processes share"
            )
        time.sleep(0.1)


def _claim(run: TrainingRun, opened: OpenedFolder) -> Identity:
    """Creates the folder, or checks that it belongs to this run; returns the identity.

    The history of a new run begins here. Accepted differences are added to those of
    `opened`, whose config, as the user wrote it, is the one that is kept.
    """
    config, folder, changed = opened.config, run.folder, opened.changed
    identity = {
        "base model": run.base.fingerprint,
        "tokenizer": run.base.tokenizer.fingerprint,
        "data": run.task.sha256,
    }
    changed |= folder.check_identity(identity, config.accept)
    if config.export:
        refuse_other_step(folder, run.config.steps, config.replace_export)
    require_room(
        folder.checkpoints, train_step.abstract_state(run.definition), config.checkpoint
    )
    if jax.process_index() == 0 and not folder.exists:
        found = identity | dict(run.base.origin)
        with folder.create(config, found, run.task.left_out):
            _keep_base(run)
    run.history.begin()
    return identity


def _moved_schedule(run: TrainingRun, step: int) -> dict[str, str]:
    """Learning rates that the config before would have had, `old -> new` by name.

    They are those of the next update and of the one that was to be the last.
    """
    before, planned = run.folder.config(), run.history.planned_steps
    steps = planned or before.steps
    if steps < 1:  # By epochs, and no start has come so far that it counted the rows.
        return {}
    old = make_schedule(before.optim, steps)
    new = make_schedule(run.config.optim, run.config.steps)
    moved = {}
    for number in dict.fromkeys((step + 1, max(step + 1, steps))):
        rates = float(old(number)), float(new(number))
        if not math.isclose(*rates, rel_tol=1e-6):
            change = f"{rates[0]:.3g} -> {rates[1]:.3g}"
            moved[f"learning rate of update {number}"] = change
    if moved:
        listed = "; ".join(f"{name}: {change}" for name, change in moved.items())
        logging.warning("the learning-rate schedule moved: %s", listed)
    return moved


def _keep_base(run: TrainingRun) -> None:
    """Keeps tokenizer and shape of the base model, which the run then has for ever."""
    save_settings(run.base.architecture, run.base.tokenizer, run.folder.tokenizer)


def record_start(
    run: TrainingRun, identity: Identity, opened: OpenedFolder, step: int
) -> None:
    """Records what the doctor found and the accepted differences.

    Call it once a checkpoint has been restored with them: a start that is refused
    leaves the files of the run as they were. `step` are the updates that it holds.
    """
    changed = opened.changed
    if changed:
        run.history.accept(changed, step, _moved_schedule(run, step))
    run.history.plan(run.config.steps)
    if jax.process_index() == 0:
        run.folder.keep_pins()
        doctor.save(run.folder.path, run.examination)
    if jax.process_index() == 0 and changed:
        if changed.keys() & {"base model", "tokenizer"}:
            _keep_base(run)
        found = identity | dict(run.base.origin)
        run.folder.update(found, run.task.left_out, opened.config)
    if jax.process_index() == 0 and run.definition.trainable.frozen_specs:
        keep_base_step(run.folder, run.config.model.init_from)
    changed.clear()


def open_checkpoints(
    run: TrainingRun, identity: Identity, changed: Mapping[str, str]
) -> Checkpointer:
    """Opens the checkpoints of `run`, which will accept the differences `changed`.

    Raises:
      UserError: the folder is unusable.
    """
    return Checkpointer(
        run.folder.checkpoints,
        run.config.checkpoint,
        identity | run.folder.origin(),
        accept={*run.history.accepted, *run.config.accept},
        report=run.warn,
        committed=run.history.commit,
        measured_on=run.history.measured_on(identity["data"], changed),
    )
