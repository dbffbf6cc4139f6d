"""One training run, start to report. Reads as the table of contents of `research`."""

import dataclasses
import logging

import jax
from rich.console import Console

from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.disk_space import require_room
from research.checkpoints.run_identity import Identity
from research.config.run_config import Config
from research.core.errors import PREEMPTED, STOPPED, STUCK, DivergedError, SaveError
from research.engine.sampler import Sampler
from research.engine.text_generation import base_generator, tuned_generator
from research.formats import huggingface_export
from research.formats.base_model import EXPORTED
from research.parallel import mesh, runtime
from research.report import terminal
from research.report.final_report import write_report
from research.report.progress_view import duration
from research.report.run_results import read_results
from research.runs import display_files, metrics_file
from research.runs.attempts import Starts
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.runs.steering.stop_signals import Preempted, StopRequest
from research.runs.steering.watchdog import Watchdog
from research.tasks import task_registry
from research.tokenize.tokenizer_training import save_tokenizer
from research.train import doctor
from research.train.fit import Run, fit, tell
from research.train.step import train_step
from research.train.step.definition_from_config import load_start, make_step_definition


def train(config: Config) -> int:
    """Trains `config` to its last step and reports; returns the exit code.

    Raises:
      UserError: whatever the user can mend; nothing is written then.
    """
    runtime.start(config.runtime)
    phases = PhaseTimer(runtime.process_age())
    folder = RunDir(config.run_dir)
    changed = folder.check_config(config)
    if folder.is_complete and not changed:
        logging.info(
            "%s is complete; its report: %s/report.md", folder.path, folder.path
        )
        return 0
    starts = Starts(phases)
    with StopRequest(phases) as stop:
        try:
            history = starts.open(folder)
            code, cause = _train(config, folder, changed, history, phases, stop)
        except Preempted as error:
            return starts.ended_by(error)
        except BaseException as error:
            code = starts.ended_by(error)
            # All processes see the same loss; any other error may be one's own.
            if jax.process_count() > 1 and not isinstance(error, DivergedError):
                rank = jax.process_index()
                logging.error("process %d failed in phase %r", rank, phases.name)
                runtime.abandon(error, code)
            raise
    history.end(cause, code)
    if code == PREEMPTED:
        runtime.leave(code)
    return code


def _train(
    config: Config,
    folder: RunDir,
    changed: dict[str, str],
    history: History,
    phases: PhaseTimer,
    stop: StopRequest,
) -> tuple[int, str]:
    """Returns the exit code, and why it ends."""
    run = prepare(config, folder, history, phases)
    stop.raise_if_lost()
    identity = claim(run, changed)
    watchdog = Watchdog(
        phases,
        config.runtime.watchdog_s,
        jax.process_index(),
        lambda cause: history.end(cause, STUCK),
    )
    checkpointer = open_checkpoints(run, identity)
    with watchdog, checkpointer:
        done = fit(
            run, checkpointer, stop, lambda: record_accepted(run, identity, changed)
        )
    if done < config.steps:
        said = "%s: stopped after step %d, which is saved; "
        said += "the same command resumes the run"
        name = stop.signal.name if stop.signal else "stop request"
        logging.info(said, name, done)
        code = PREEMPTED if stop.signal else STOPPED
        return code, f"{name} after step {done}"
    stop.raise_if_lost()  # All is saved; the report can wait.
    phases.enter("finish")
    finish(run)
    return 0, "done"


def claim(run: Run, changed: dict[str, str]) -> Identity:
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


def record_accepted(run: Run, identity: Identity, changed: dict[str, str]) -> None:
    """What was accepted holds once a checkpoint has been restored with it."""
    run.history.accept(changed)
    if jax.process_index() == 0 and changed:
        run.folder.update(identity, run.task.left_out, run.config)
    changed.clear()


def open_checkpoints(run: Run, identity: Identity) -> Checkpointer:
    return Checkpointer(
        run.folder.checkpoints,
        run.config.checkpoint,
        identity,
        accept={*run.history.accepted, *run.config.accept},
        report=lambda what: tell(run, what),
        committed=run.history.commit,
    )


def prepare(
    config: Config, folder: RunDir, history: History, phases: PhaseTimer
) -> Run:
    """Opens, loads and examines everything; writes nothing into `folder`."""
    console = Console(quiet=jax.process_index() > 0)
    base = task_registry.open_start(config, folder.own_tokenizer)
    # Before the data is read: what does not fit the mesh is said at once.
    definition = make_step_definition(config, base, mesh.make_mesh(config.mesh))
    task = task_registry.load_task(config, base)
    definition = dataclasses.replace(definition, groups=len(task.groups))
    params, frozen = load_start(definition, base)
    state = train_step.jit_init(definition)(params)
    examination = doctor.examine(base, definition, state, frozen, task)
    terminal.show_findings(console, examination.findings)
    terminal.show_preview(console, examination.preview)
    doctor.require_healthy(examination.findings)
    return Run(
        config=config,
        folder=folder,
        base=base,
        task=task,
        definition=definition,
        sampler=Sampler(definition.model),
        state=state,
        frozen=frozen,
        examination=examination,
        console=console,
        phases=phases,
        history=history,
    )


def finish(run: Run) -> None:
    """The plot, the table, what the model says, and the model for others.

    Raises:
      SaveError: they could not be written; the last step is saved all the same.
    """
    try:
        _finish(run)
    except OSError as error:
        raise SaveError(
            f"all {run.config.steps} steps are saved, and the report could not be "
            f"written: {error}; make room or give back the right to write, then start "
            "the same command again",
            run.config.steps,
        ) from error


def _finish(run: Run) -> None:
    folder = run.folder.path
    definition, base = run.definition, run.base
    trainable = definition.trainable
    tuned = tuned_generator(
        run.sampler, trainable, run.state.params, run.frozen, base.tokenizer
    )
    # The export first: nothing that only shows results may cost it.
    if run.config.export:
        weights = trainable.forward(run.state.params, run.frozen, None)
        huggingface_export.export(
            definition.model,
            weights,
            task_registry.exported_tokenizer(run.config, base),
            folder / EXPORTED,
        )
    answers = run.task.conclude(
        lambda: base_generator(run.sampler, base, definition.mesh, run.frozen), tuned
    )
    if jax.process_index() > 0:
        return
    lines = [x for x in metrics_file.read_metrics(folder) if x["kind"] == "train"]
    seconds, goodput = lines[-1]["elapsed_s"], run.history.goodput()
    metrics_file.append_line(folder, run.config.steps, "goodput", goodput.line())
    facts = {
        "base model": run.base.name,
        "data": run.task.origin,
        "steps": run.config.steps,
        "training time": duration(seconds),
        "tokens per second": round(sum(x["tokens"] for x in lines) / seconds),
        "peak memory, GB": round(lines[-1]["memory_gb"], 2),
        "goodput": str(goodput),
    }
    display_files.write_answers(folder, answers)
    results = read_results(folder, facts, goodput.parts)
    failed = write_report(run.console, folder, results)
    if failed:
        facts["missing in the report"] = "; ".join(failed)
    run.folder.mark_complete(facts)
    logging.info("%s", "  ".join(f"{k}: {v}" for k, v in facts.items()))
    logging.info(
        "done: %s/loss.png, %s/report.md; talk to it with\n"
        "  python -m research.generate --run=%s%s",
        folder,
        folder,
        folder,
        " --compare" if run.base.tensors else "",
    )
