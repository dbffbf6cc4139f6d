"""From configs to run directories: opens, resumes, trains and reports them together.

Each run keeps its own folder, lock, history, metrics, checkpoints and report, as if
it had trained alone; `research.train` goes on with any of them.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Sequence

from rich.console import Console

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import Config
from research.core.errors import PREEMPTED, STOPPED, STUCK, DivergedError
from research.engine.sampler import Sampler
from research.parallel import mesh as meshes
from research.parallel import runtime
from research.report import terminal
from research.runs.attempts import Starts
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.runs.steering.stop_signals import Preempted, StopRequest
from research.runs.steering.watchdog import Watchdog
from research.tasks import task_registry
from research.train import doctor, pipeline
from research.train.fit import Run, restore
from research.train.step import train_step
from research.train.step.definition_from_config import load_start, make_step_definition
from research.train_together import compatibility, pack_fit


def train(configs: Sequence[Config], at_once: int = 0) -> int:
    """Trains all to their last step; returns the exit code, the worst of the runs'.

    Args:
      configs: of the runs.
      at_once: how many are under one `vmap`; 0 for what suits the device.

    Raises:
      UserError: whatever the user can mend; nothing is written then.
    """
    compatibility.check(configs)
    runtime.start(configs[0].runtime)
    phases = PhaseTimer(runtime.process_age())
    waiting: list[tuple[Config, RunDir, dict[str, str]]] = []
    for config in configs:
        folder = RunDir(config.run_dir)
        changed = folder.check_config(config)
        if folder.is_complete and not changed:
            logging.info("%s is complete", folder.path)
            continue
        waiting.append((config, folder, changed))
    if not waiting:
        return 0
    starts = Starts(phases)
    with StopRequest(phases) as stop:
        try:
            wanted = [(c, f, starts.open(f)) for c, f, _ in waiting]
            runs = prepare(wanted, phases)
            stop.raise_if_lost()
            code = _train(runs, [change for _, _, change in waiting], stop, at_once)
        except Preempted as error:
            return starts.ended_by(error)
        except BaseException as error:
            # Whatever ends all of them at once is the end of each.
            starts.ended_by(error)
            raise
    if code == PREEMPTED:
        runtime.leave(code)
    return code


def prepare(
    wanted: Sequence[tuple[Config, RunDir, History]], phases: PhaseTimer
) -> list[Run]:
    """Opens base and data once; writes nothing. Runs of one seed share their rows."""
    shared = wanted[0][0]
    base = task_registry.open_start(shared, wanted[0][1].own_tokenizer)
    mesh = meshes.make_mesh(shared.mesh)
    tasks = {}
    runs: list[Run] = []
    for config, folder, history in wanted:
        definition = make_step_definition(config, base, mesh)
        if config.seed not in tasks:
            tasks[config.seed] = task_registry.load_task(config, base)
        task = tasks[config.seed]
        definition = dataclasses.replace(definition, groups=len(task.groups))
        params, frozen = load_start(definition, base, runs[0].frozen if runs else None)
        sampler = runs[0].sampler if runs else Sampler(definition.model)
        state = train_step.jit_init(definition)(params)
        run = Run(
            config=config,
            folder=folder,
            base=base,
            task=task,
            definition=definition,
            sampler=sampler,
            state=state,
            frozen=frozen,
            examination=doctor.examine(base, definition, state, frozen, task),
            console=Console(quiet=bool(runs)),
            phases=phases,
            history=history,
        )
        terminal.show_findings(run.console, run.examination.findings)
        terminal.show_preview(run.console, run.examination.preview)
        doctor.require_healthy(run.examination.findings)
        runs.append(run)
    return runs


def _train(
    runs: Sequence[Run],
    changed: Sequence[dict[str, str]],
    stop: StopRequest,
    at_once: int,
) -> int:
    shared, phases = runs[0].config, runs[0].phases
    identities = [pipeline.claim(*pair) for pair in zip(runs, changed, strict=True)]

    def stuck(cause: str) -> None:
        for run in runs:
            run.history.end(cause, STUCK)

    code = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(Watchdog(phases, shared.runtime.watchdog_s, 0, stuck))
        opened: list[tuple[Run, Checkpointer, int, dict | None]] = []
        for run, identity, change in zip(runs, identities, changed, strict=True):
            checkpointer = pipeline.open_checkpoints(run, identity)
            stack.enter_context(checkpointer)
            first, position = restore(run, checkpointer)
            pipeline.record_accepted(run, identity, change)
            opened.append((run, checkpointer, first, position))
        # A kill between two saves leaves runs at different steps: these go on apart.
        for first, group in itertools.groupby(
            sorted(opened, key=lambda part: part[2]), key=lambda part: part[2]
        ):
            if not stop.signal:
                members = [pack_fit.Member(run, ckpt, at) for run, ckpt, _, at in group]
                pack = pack_fit.Pack(members, first, stop, at_once)
                code = max(code, _finish(pack, pack.fit(), stop))
    if stop.signal:
        return PREEMPTED
    return code


def _finish(pack: pack_fit.Pack, done: int, stop: StopRequest) -> int:
    """Reports of the runs that are done; returns the exit code."""
    code = 0
    for member in pack.members:
        run, history = member.run, member.run.history
        if member.failed:
            history.end(str(member.failed).partition("\n")[0], DivergedError.exit_code)
            code = DivergedError.exit_code
        elif done < run.config.steps:
            end = PREEMPTED if stop.signal else STOPPED
            name = stop.signal.name if stop.signal else "stop request"
            history.end(f"{name} after step {done}", end)
            code = max(code, end)
        else:
            run.phases.enter("finish")
            pipeline.finish(run)
            history.end("done", 0)
    return code
