"""Training runs, start to report. Read this first: the table of contents of a run."""

import contextlib
import logging
from collections.abc import Sequence

import jax

from research.config.run_config import Config
from research.core.errors import PREEMPTED, STOPPED, STUCK, DivergedError
from research.parallel import agreement, runtime
from research.runs.control.os_signals import Preempted, StopRequest
from research.runs.control.watchdog import Watchdog
from research.runs.lineage.adapter_start import with_adapter
from research.runs.lineage.start_pins import keep_base_step, pin_start
from research.runs.phase_timer import PhaseTimer
from research.runs.recorded_starts import RecordedStarts
from research.runs.run_directory import RunDir
from research.train.finish_run import finish
from research.train.fit_runs import fit
from research.train.prepare_runs import (
    OpenedFolder,
    claim,
    facts_of_start,
    open_checkpoints,
    prepare,
    record_start,
)
from research.train.restore_run import RestoredRun, restore


def train(configs: Sequence[Config], at_once: int = 0) -> int:
    """Trains runs to their last step and reports; returns the worst exit code.

    Args:
      configs: one run, or runs that `train.together` has found compatible.
      at_once: runs under one `vmap`; 0 chooses what suits the device.

    Raises:
      UserError: something the user can fix; nothing is written then.
    """
    runtime.start(configs[0].runtime)
    phases = PhaseTimer(runtime.process_age())
    starts = RecordedStarts(phases)
    with StopRequest(phases) as stop:
        try:
            wanted = agreement.together(
                lambda: _open_unfinished(configs),
                lambda wanted: facts_of_start(configs, wanted),
            )
            for each in wanted:
                each.config = pin_start(each.folder, each.config, wanted[0].folder.pins)
                each.history = starts.open(each.folder)
            code = _train(wanted, phases, stop, at_once) if wanted else 0
        except Preempted as error:
            return starts.ended_by(error)
        except BaseException as error:
            code = starts.ended_by(error)
            # All processes see the same loss; any other error may be this one's alone.
            if jax.process_count() > 1 and not isinstance(error, DivergedError):
                rank = jax.process_index()
                logging.error("process %d failed in phase %r", rank, phases.name)
                runtime.abandon(error, code)
            raise
    if code == PREEMPTED:
        runtime.leave(code)
    return code


def _open_unfinished(configs: Sequence[Config]) -> list[OpenedFolder]:
    """The folders of the runs that are not complete, or that accept a difference."""
    wanted = []
    for config in configs:
        folder = RunDir(config.run_dir)
        config = with_adapter(config, folder)
        changed = folder.check_config(config)
        if folder.is_complete and not changed:
            path = folder.path
            logging.info("%s is complete; its report: %s/report.md", path, path)
            # The folder may have moved since its last start.
            if jax.process_index() == 0 and config.trainable != "full":
                keep_base_step(folder, folder.config().model.init_from)
        else:
            wanted.append(OpenedFolder(config, folder, changed))
    return wanted


def _train(
    opened: Sequence[OpenedFolder], phases: PhaseTimer, stop: StopRequest, at_once: int
) -> int:
    """Returns the exit code; the history of each run then says how it ended."""
    runs = prepare(opened, phases)
    stop.raise_if_lost()
    identities = claim(runs, opened)

    def stuck(cause: str) -> None:
        for run in runs:
            run.history.end(cause, STUCK)

    limit = runs[0].config.runtime.watchdog_s
    with contextlib.ExitStack() as stack:
        stack.enter_context(Watchdog(phases, limit, jax.process_index(), stuck))
        by_step: dict[int, list[RestoredRun]] = {}
        for run, identity, each in zip(runs, identities, opened, strict=True):
            checkpointer = stack.enter_context(
                open_checkpoints(run, identity, each.changed)
            )
            step, position = restore(run, checkpointer)
            record_start(run, identity, each, step)
            restored = RestoredRun(run, checkpointer, position)
            by_step.setdefault(step, []).append(restored)
        ended = _fit_all(by_step, stop, at_once)
    if stop.unreachable:
        raise stop.unreachable  # All is saved.
    # First those that are not done: a signal may cut the reports of the others short.
    ended.sort(key=lambda each: each[1] >= each[0].run.config.steps)
    return max([_conclude(restored, done, stop) for restored, done in ended])


def _fit_all(
    by_step: dict[int, list[RestoredRun]], stop: StopRequest, at_once: int
) -> list[tuple[RestoredRun, int]]:
    """Trains the runs that are at one step together, and returns each one's last step.

    A kill between the saves of a pack leaves its runs at different steps.
    """
    ended: list[tuple[RestoredRun, int]] = []
    stopped = False
    for step, together in sorted(by_step.items()):
        done = step
        if not stopped:
            try:
                done = fit(together, step, stop, at_once)
            except DivergedError as error:
                if len(together) == len(by_step) == 1:
                    raise
                (last,) = [each for each in together if each.diverged is error]
                logging.error("%s: %s", last.run.config.run_dir, error)
                done = error.step
            else:
                stopped = done < together[0].run.config.steps
        ended += [(restored, done) for restored in together]
    return ended


def _conclude(restored: RestoredRun, done: int, stop: StopRequest) -> int:
    """Reports a run that is done, and records how it ended; returns its exit code."""
    run = restored.run
    if restored.diverged:
        code, cause = DivergedError.exit_code, str(restored.diverged).partition("\n")[0]
    elif done < run.config.steps and not run.ended_early:
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
        code, cause = 0, "done"
        if run.ended_early:
            cause = f"done after step {done}: {run.ended_early}"
            logging.info("the run is %s", cause)
        finish(run, done)
    run.history.end(cause, code)
    return code
