"""From run directories to runs that are ready to train, and the claim to each folder.

Everything is opened, loaded and examined before anything is written.
"""

import dataclasses
from collections.abc import Sequence

import jax
from rich.console import Console

from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.disk_space import require_room
from research.checkpoints.run_identity import Identity
from research.config.run_config import Config
from research.engine.sampler import Sampler
from research.parallel import mesh
from research.report import terminal
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.tasks import task_registry
from research.tasks.task_protocol import Task
from research.tokenize.tokenizer_training import save_tokenizer
from research.train import doctor
from research.train.step import train_step
from research.train.step.definition_from_config import load_start, make_step_definition
from research.train.training_run import TrainingRun


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


def prepare(opened: Sequence[OpenedFolder], phases: PhaseTimer) -> list[TrainingRun]:
    """Opens, loads and examines everything; writes nothing into the run directories.

    The runs share one base model and mesh, and runs of one seed share their rows.
    """
    first = opened[0]
    base = task_registry.open_start(first.config, first.folder.own_tokenizer)
    devices = mesh.make_mesh(first.config.mesh)
    tasks: dict[int, Task] = {}
    runs: list[TrainingRun] = []
    for each in opened:
        config = each.config
        # Before the data is read: a model that does not fit the mesh is refused early.
        objective = task_registry.make_objective(config, devices)
        definition = make_step_definition(config, base, devices, objective)
        if config.seed not in tasks:
            tasks[config.seed] = task_registry.load_task(config, base)
        task = tasks[config.seed]
        objective = task_registry.make_objective(config, devices, len(task.groups))
        definition = dataclasses.replace(definition, objective=objective)
        params, frozen = load_start(definition, base, runs[0].frozen if runs else None)
        state = train_step.jit_init(definition)(params)
        examination = doctor.examine(base, definition, state, frozen, task)
        console = Console(quiet=jax.process_index() > 0 or bool(runs))
        terminal.show_findings(console, examination.findings)
        terminal.show_preview(console, examination.preview)
        doctor.require_healthy(examination.findings)
        runs.append(
            TrainingRun(
                config=config,
                folder=each.folder,
                base=base,
                task=task,
                definition=definition,
                sampler=runs[0].sampler if runs else Sampler(definition.model),
                state=state,
                frozen=frozen,
                examination=examination,
                console=console,
                phases=phases,
                history=each.history,
            )
        )
    return runs


def claim(run: TrainingRun, changed: dict[str, str]) -> Identity:
    """Creates the folder, or checks that it belongs to this run; returns the identity.

    The history of a new run begins here. Accepted differences are added to `changed`.

    Raises:
      UserError: it belongs to other data, or the disk has no room.
    """
    config, folder = run.config, run.folder
    identity = {
        "base model": run.base.fingerprint,
        "tokenizer": run.base.tokenizer.fingerprint,
        "data": run.task.sha256,
    }
    changed |= folder.check_identity(identity, config.accept)
    require_room(
        folder.checkpoints, train_step.abstract_state(run.definition), config.checkpoint
    )
    if jax.process_index() == 0 and not folder.exists:
        with folder.create(config, identity, run.task.left_out):
            save_tokenizer(run.base.tokenizer, folder.tokenizer)
    run.history.begin()
    return identity


def record_start(run: TrainingRun, identity: Identity, changed: dict[str, str]) -> None:
    """Records what the doctor found and the accepted differences.

    Call it once a checkpoint has been restored with them: a start that is refused
    leaves the files of the run as they were.
    """
    run.history.accept(changed)
    if jax.process_index() == 0:
        run.folder.keep_pins()
        doctor.save(run.folder.path, run.examination)
    if jax.process_index() == 0 and changed:
        run.folder.update(identity, run.task.left_out, run.config)
    changed.clear()


def open_checkpoints(run: TrainingRun, identity: Identity) -> Checkpointer:
    """Opens the checkpoints of `run`. Raises UserError if the folder is unusable."""
    return Checkpointer(
        run.folder.checkpoints,
        run.config.checkpoint,
        identity | run.folder.origin(),
        accept={*run.history.accepted, *run.config.accept},
        report=run.warn,
        committed=run.history.commit,
    )
