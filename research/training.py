"""One training run, start to report. Reads as the table of contents of `research`."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console

from research import (
    doctor,
    exporting,
    jobs,
    loop,
    mesh,
    metrics,
    profiling,
    report,
    runtime,
    step,
)
from research.answers import base_model, tuned_model
from research.base import EXPORTED, Base
from research.checkpoint import Checkpointer
from research.config import Config
from research.data.bpe import save_tokenizer
from research.evaluate import evaluate
from research.progress import duration
from research.run_dir import RunDir
from research.sampling import Sampler
from research.step_log import StepLog
from research.tasks import opening
from research.tasks.protocol import Task

RESUMABLE = 75  # EX_TEMPFAIL: stopped by a signal, run the same command again.


@dataclasses.dataclass
class Run:
    """A run that has passed its doctor: everything the loop needs.

    Attributes:
      evaluated: step and loss of the last evaluation, what `keep_best` judges by.
    """

    config: Config
    folder: RunDir
    base: Base
    task: Task
    job: step.Job
    sampler: Sampler
    state: step.TrainState | None
    frozen: dict[str, Any]
    console: Console
    evaluated: tuple[int, float] | None = None


def train(config: Config) -> int:
    """Trains `config` to its last step and reports; returns the exit code.

    Raises:
      UserError: whatever the user can mend; nothing is written then.
    """
    runtime.start(config.runtime)
    folder = RunDir(config.run_dir)
    folder.check_config(config)
    if folder.is_complete:
        logging.info(
            "%s is complete; its report: %s/report.md", folder.path, folder.path
        )
        return 0
    run = prepare(config, folder)
    identity = {
        "base model": run.base.fingerprint,
        "tokenizer": run.base.tokenizer.fingerprint,
        "data": run.task.sha256,
    }
    folder.check_identity(identity)
    runtime.raise_if_interrupted()
    if jax.process_index() == 0 and not folder.exists:
        with folder.create(config, identity, run.task.left_out):
            save_tokenizer(run.base.tokenizer, folder.tokenizer)
    with Checkpointer(folder.checkpoints, config.checkpoint, identity) as checkpointer:
        done = fit(run, checkpointer)
    if done < config.steps:
        logging.info("stopped after step %d; the same command goes on from there", done)
        return RESUMABLE
    finish(run)
    return 0


def prepare(config: Config, folder: RunDir) -> Run:
    """Opens, loads and examines everything; writes nothing into `folder`."""
    console = Console(quiet=jax.process_index() > 0)
    base = opening.open_start(config, folder)
    # Before the data is read: what does not fit the mesh is said at once.
    job = jobs.make_job(config, base, mesh.make_mesh(config.mesh))
    task = opening.load_task(config, base)
    job = dataclasses.replace(job, groups=len(task.groups))
    params, frozen = jobs.load_start(job, base)
    state = step.jit_init(job)(params)
    findings = doctor.examine_model(base, job, state, frozen) + task.examine()
    doctor.show(console, findings)
    task.show_first_row(console)
    doctor.require_healthy(findings)
    sampler = Sampler(job.model)
    return Run(config, folder, base, task, job, sampler, state, frozen, console)


def fit(run: Run, checkpointer: Checkpointer) -> int:
    """Restores, loops, saves; returns the number of updates made in all."""
    config, job = run.config, run.job
    mine = mesh.local_rows(job.mesh, config.data.batch_size, microbatches(config))
    batches = run.task.batches(mine)
    first, clock = 0, metrics.Clock()
    if checkpointer.latest_step is not None:
        run.state = None  # Room for the one that is read.
    restored = checkpointer.restore(step.abstract_state(job))
    if restored:
        first, run.state = restored.step, restored.state
        batches.set_state(restored.position["data"])
        clock = metrics.Clock(restored.position["elapsed"])
    log = StepLog(
        config,
        run.folder.path,
        run.console,
        clock,
        count_flops(run),
        run.task.groups,
        first,
    )

    def save(number: int, state: step.TrainState) -> None:
        position = {"data": batches.get_state(), "elapsed": clock.elapsed}
        known, loss = run.evaluated or (-1, None)
        # Only a loss of these very parameters says how good they are.
        checkpointer.save(number, state, position, loss if known == number else None)

    with (
        loop.StopRequest(listen=jax.process_count() == 1) as stop,
        profiling.trace_steps(
            make_step(run), run.folder.path, first, config.runtime
        ) as step_fn,
    ):
        try:
            run.state, done = loop.run(
                state=run.state,
                first=first,
                total=config.steps,
                batches=_on_devices(batches, run),
                step_fn=step_fn,
                actions=[
                    loop.Action(config.eval.every, make_evaluation(run, log), True),
                    loop.Action(config.checkpoint.every, save),
                    # After the save: a sample that fails must not cost a step.
                    loop.Action(
                        config.eval.samples_every or config.steps, make_sampling(run)
                    ),
                ],
                log=log,
                resume_clock=clock.resume,
                stop=stop,
            )
            save(done, run.state)
        finally:
            log.close()
    return done


def make_step(run: Run) -> profiling.StepFn:
    """The train step over this run's frozen parameters; its first call is announced."""
    jitted = runtime.announce_first_call(step.jit_train_step(run.job), "first step")
    return lambda state, batch: jitted(state, run.frozen, batch)


def microbatches(config: Config) -> int:
    """Forward passes per optimizer step."""
    return config.data.batch_size // config.data.rows_per_pass


def count_flops(run: Run) -> metrics.FlopCount:
    """What a step of this run needs, for MFU."""
    return metrics.count_flops(
        run.base.architecture,
        trained=sum(x.size for x in jax.tree.leaves(run.state.params)),
        full=not run.frozen,
    )


def _on_devices(batches: Iterator[Any], run: Run) -> Iterator[Any]:
    rows, parts = run.config.data.batch_size, microbatches(run.config)
    for batch in batches:
        yield mesh.to_global(batch, run.job.mesh, parts, rows)


Action = Callable[[int, step.TrainState], None]


def make_evaluation(run: Run, log: StepLog) -> Action:
    """The action that evaluates all held-out rows and logs the result."""
    rows = run.config.data.rows_per_pass
    local = run.task.held_out(rows, mesh.local_rows(run.job.mesh, rows))
    batches = [mesh.to_global(batch, run.job.mesh, rows=rows) for batch in local]
    eval_fn = step.jit_eval_step(run.job)

    def action(number: int, state: step.TrainState) -> None:
        found = evaluate(
            lambda batch: eval_fn(state.params, run.frozen, batch),
            batches,
            run.task.groups,
            run.task.held_out_bytes,
        )
        run.evaluated = (number, found.loss)
        log.evaluation(number, found)

    return action


def make_sampling(run: Run) -> Action:
    """The action that lets the model so far say something."""

    def action(number: int, state: step.TrainState) -> None:
        model = tuned_model(run.job, run.base, run.sampler, state.params, run.frozen)
        run.task.sample(number, model, run.folder.path)

    return action


def finish(run: Run) -> None:
    """The plot, the table, what the model says, and the model for others."""
    folder = run.folder.path
    arguments = (run.job, run.base, run.sampler)
    tuned = tuned_model(*arguments, run.state.params, run.frozen)
    said = run.task.conclude(
        run.console, lambda: base_model(*arguments, run.frozen), tuned, folder
    )
    if run.config.export:
        weights = run.job.trainable.forward(run.state.params, run.frozen, None)
        exporting.export(run.job.model, weights, run.base.tokenizer, folder / EXPORTED)
    if jax.process_index() > 0:
        return
    lines = [x for x in metrics.read_metrics(folder) if x["kind"] == "train"]
    seconds = lines[-1]["elapsed_s"]
    facts = {
        "base model": run.base.name,
        "data": run.task.origin,
        "steps": run.config.steps,
        "training time": duration(seconds),
        "tokens per second": round(sum(x["tokens"] for x in lines) / seconds),
        "peak memory, GB": round(lines[-1]["memory_gb"], 2),
    }
    report.plot(folder, folder.name)
    report.show_table(run.console, folder)
    report.write_markdown(folder, facts, said)
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
