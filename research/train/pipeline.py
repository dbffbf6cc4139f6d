"""Training runs, start to report. Read this first: the table of contents of a run."""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence

import jax
from rich.console import Console

from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.disk_space import require_room
from research.checkpoints.run_identity import Identity
from research.config.run_config import Config
from research.core.errors import PREEMPTED, STOPPED, STUCK, DivergedError
from research.engine.sampler import Sampler
from research.parallel import mesh, runtime
from research.report import terminal
from research.runs.attempts import Attempts
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.runs.steering.stop_signals import Preempted, StopRequest
from research.runs.steering.watchdog import Watchdog
from research.tasks import task_registry
from research.tasks.task_protocol import Task
from research.tokenize.tokenizer_training import save_tokenizer
from research.train import doctor
from research.train.finish_run import finish
from research.train.fit import PackMember, fit, restore
from research.train.step import train_step
from research.train.step.definition_from_config import load_start, make_step_definition
from research.train.training_run import TrainingRun


def train(configs: Sequence[Config], at_once: int = 0) -> int:
    """Trains runs to their last step and reports; returns the worst exit code.

    Args:
      configs: one run, or runs that `train_together` has found compatible.
      at_once: runs under one `vmap`; 0 chooses what suits the device.

    Raises:
      UserError: something the user can fix; nothing is written then.
    """
    runtime.start(configs[0].runtime)
    phases = PhaseTimer(runtime.process_age())
    wanted = [config for config in configs if not _is_complete(config)]
    if not wanted:
        return 0
    attempts = Attempts(phases)
    with StopRequest(phases) as stop:
        try:
            opened = []
            for config in wanted:
                folder = RunDir(config.run_dir)
                changed = folder.check_config(config)
                opened.append(OpenedFolder(config, folder, changed))
            for each in opened:
                each.history = attempts.open(each.folder)
            code = _train(opened, phases, stop, at_once)
        except Preempted as error:
            return attempts.ended_by(error)
        except BaseException as error:
            code = attempts.ended_by(error)
            # All processes see the same loss; any other error may be this one's alone.
            if jax.process_count() > 1 and not isinstance(error, DivergedError):
                rank = jax.process_index()
                logging.error("process %d failed in phase %r", rank, phases.name)
                runtime.abandon(error, code)
            raise
    if code == PREEMPTED:
        runtime.leave(code)
    return code


@dataclasses.dataclass
class OpenedFolder:
    """A run directory and its config, before anything is loaded.

    Attributes:
      changed: `old -> new` by name of what differs from the run and was accepted.
    """

    config: Config
    folder: RunDir
    changed: dict[str, str]
    history: History | None = None


def _is_complete(config: Config) -> bool:
    folder = RunDir(config.run_dir)
    if folder.check_config(config) or not folder.is_complete:
        return False
    path = folder.path
    logging.info("%s is complete; its report: %s/report.md", path, path)
    return True


def _train(
    opened: Sequence[OpenedFolder], phases: PhaseTimer, stop: StopRequest, at_once: int
) -> int:
    """Returns the exit code; every run's history then says how it ended."""
    runs = prepare(opened, phases)
    stop.raise_if_lost()
    identities = [
        claim(run, each.changed) for run, each in zip(runs, opened, strict=True)
    ]

    def stuck(cause: str) -> None:
        for run in runs:
            run.history.end(cause, STUCK)

    limit = runs[0].config.runtime.watchdog_s
    with contextlib.ExitStack() as stack:
        stack.enter_context(Watchdog(phases, limit, jax.process_index(), stuck))
        restored: dict[int, list[PackMember]] = {}
        for run, identity, each in zip(runs, identities, opened, strict=True):
            checkpointer = stack.enter_context(open_checkpoints(run, identity))
            step, position = restore(run, checkpointer)
            record_accepted(run, identity, each.changed)
            member = PackMember(run, checkpointer, position)
            restored.setdefault(step, []).append(member)
        # A kill between the saves of a pack leaves runs at different steps: those at
        # one step train together.
        ended: list[tuple[PackMember, int]] = []
        stopped = False
        for step, members in sorted(restored.items()):
            done = step if stopped else fit(members, step, stop, at_once)
            stopped |= any(done < m.run.config.steps for m in members if not m.diverged)
            ended += [(member, done) for member in members]
    return max(_finish(member, done, stop) for member, done in ended)


def _finish(member: PackMember, done: int, stop: StopRequest) -> int:
    """Reports a run that is done, and writes down how it ended; returns the code."""
    run = member.run
    if member.diverged:
        code, cause = DivergedError.exit_code, str(member.diverged).partition("\n")[0]
    elif done < run.config.steps:
        name = stop.signal.name if stop.signal else "stop request"
        code = PREEMPTED if stop.signal else STOPPED
        cause = f"{name} after step {done}"
        logging.info(
            "%s: stopped after step %d, which is saved; the same command resumes the "
            "run",
            name,
            done,
        )
    else:
        stop.raise_if_lost()  # All is saved; the report can wait.
        run.phases.enter("finish")
        finish(run)
        code, cause = 0, "done"
    run.history.end(cause, code)
    return code


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
        # Before the data is read: what does not fit the mesh is refused at once.
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
    """Makes the folder the run's own, or sees that it is; returns whose it is.

    The history of a new run begins here. What differs and was accepted is added to
    `changed`.

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
    if jax.process_index() == 0:
        doctor.save(folder.path, run.examination)
    run.history.begin()
    return identity


def record_accepted(
    run: TrainingRun, identity: Identity, changed: dict[str, str]
) -> None:
    """What was accepted holds once a checkpoint has been restored with it."""
    run.history.accept(changed)
    if jax.process_index() == 0 and changed:
        run.folder.update(identity, run.task.left_out, run.config)
    changed.clear()


def open_checkpoints(run: TrainingRun, identity: Identity) -> Checkpointer:
    return Checkpointer(
        run.folder.checkpoints,
        run.config.checkpoint,
        identity,
        accept={*run.history.accepted, *run.config.accept},
        report=run.warn,
        committed=run.history.commit,
    )
