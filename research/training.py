"""One training run, start to report. Reads as the table of contents of `research`."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console

from research import doctor, jobs, loop, mesh, metrics, report, runtime, step
from research.answers import answer_prompts
from research.base import Base, open_base
from research.checkpoint import Checkpointer
from research.config import Config
from research.data.chat import ChatFormat
from research.data.loader import BatchIterator, Dataset, eval_batches, load_dataset
from research.evaluate import Evaluation, evaluate
from research.optim import make_schedule
from research.progress import ProgressView, duration
from research.run_dir import RunDir

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
    chat: ChatFormat
    dataset: Dataset
    job: step.Job
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
        "data": run.dataset.rows.sha256,
    }
    folder.check_identity(identity)
    if jax.process_index() == 0:
        folder.create(config, identity, run.dataset.examples)
    with Checkpointer(folder.checkpoints, config.checkpoint, identity) as checkpointer:
        done = fit(run, checkpointer)
    if done < config.steps:
        logging.info("stopped after step %d; the same command goes on from there", done)
        return RESUMABLE
    finish(run)
    return 0


def prepare(config: Config, folder: RunDir) -> Run:
    """Opens, loads and examines everything; writes nothing."""
    console = Console()
    base = open_base(config.model.weights, config.data.hub_timeout)
    job = jobs.make_job(config, base, mesh.make_mesh(config.mesh))
    chat = ChatFormat(base.tokenizer, config.data.template, config.data.system)
    dataset = load_dataset(config, chat)
    params, frozen = jobs.load_start(job, base)
    state = step.jit_init(job)(params)
    findings = doctor.examine_model(base, job, state, frozen)
    findings += doctor.examine_data(config, dataset, chat)
    if jax.process_index() == 0:
        doctor.show(console, findings)
        doctor.show_first_row(console, dataset, base)
    doctor.require_healthy(findings)
    return Run(config, folder, base, chat, dataset, job, state, frozen, console)


def fit(run: Run, checkpointer: Checkpointer) -> int:
    """Restores, loops, saves; returns the number of updates made in all."""
    config, job = run.config, run.job
    rows = mesh.local_rows(job.mesh, config.data.batch_size, microbatches(config))
    batches = BatchIterator(
        run.dataset.train, config.data.batch_size, config.seed, rows
    )
    first, clock = 0, metrics.Clock()
    abstract = step.abstract_state(job)
    if checkpointer.latest_step is not None:
        run.state = None  # Room for the one that is read.
    restored = checkpointer.restore(abstract)
    if restored:
        first, run.state = restored.step, restored.state
        batches.set_state(restored.position["data"])
        clock = metrics.Clock(restored.position["elapsed"])
    log = StepLog(run, clock, first)
    step_fn = runtime.announce_first_call(step.jit_train_step(job), "first step")

    def save(number: int, state: step.TrainState) -> None:
        position = {"data": batches.get_state(), "elapsed": clock.elapsed}
        known, loss = run.evaluated or (-1, None)
        # Only a loss of these very parameters says how good they are.
        checkpointer.save(number, state, position, loss if known == number else None)

    with loop.StopRequest(listen=jax.process_count() == 1) as stop:
        try:
            run.state, done = loop.run(
                state=run.state,
                first=first,
                total=config.steps,
                batches=_on_devices(batches, run),
                step_fn=lambda state, batch: step_fn(state, run.frozen, batch),
                actions=[
                    loop.Action(config.eval.every, make_evaluation(run, log), True),
                    loop.Action(config.checkpoint.every, save),
                ],
                log=log,
                resume_clock=clock.resume,
                stop=stop,
            )
            save(done, run.state)
        finally:
            log.close()
    return done


def microbatches(config: Config) -> int:
    """Forward passes per optimizer step."""
    return config.data.batch_size // config.data.rows_per_pass


def _on_devices(batches: Iterator[Any], run: Run) -> Iterator[Any]:
    rows, parts = run.config.data.batch_size, microbatches(run.config)
    for batch in batches:
        yield mesh.to_global(batch, run.job.mesh, parts, rows)


def make_evaluation(run: Run, log: "StepLog") -> Any:
    """The action that evaluates all held-out rows and logs the result."""
    rows = run.config.data.rows_per_pass
    mine = mesh.local_rows(run.job.mesh, rows)
    local = eval_batches(run.dataset.held_out, rows, mine)
    batches = [mesh.to_global(batch, run.job.mesh, rows=rows) for batch in local]
    eval_fn = step.jit_eval_step(run.job, len(run.dataset.categories))

    def action(number: int, state: step.TrainState) -> None:
        found = evaluate(
            lambda batch: eval_fn(state.params, run.frozen, batch),
            batches,
            run.dataset.categories,
        )
        run.evaluated = (number, found.loss)
        log.evaluation(number, found)

    return action


class StepLog:
    """Turns a step's sums into lines, TensorBoard points and the progress view."""

    def __init__(self, run: Run, clock: metrics.Clock, first: int):
        config = run.config
        self._clock = clock
        self._schedule = make_schedule(config.optim, config.steps)
        self._flops = metrics.count_flops(
            run.base.architecture,
            trained=sum(x.size for x in jax.tree.leaves(run.state.params)),
            full=not run.frozen,
        )
        self._peak = runtime.peak_flops(config.runtime, config.model.dtype)
        leader = jax.process_index() == 0
        self._file = metrics.MetricsFile(run.folder.path, first) if leader else None
        mode = config.runtime.progress if leader else "none"
        self._view = ProgressView(run.console, mode, first, config.steps)

    def __call__(self, number: int, sums: step.Metrics) -> None:
        values = {name: float(value) for name, value in sums.items()}
        self._clock.tick()
        seconds = self._clock.last
        flops = self._flops.step(values["tokens"], values["weight"], values["pairs"])
        line = {
            "loss": values["loss"],
            "learning_rate": float(self._schedule(number)),
            "grad_norm": values["grad_norm"],
            "tokens": int(values["tokens"]),
            "trained_tokens": int(values["weight"]),
            "step_s": seconds,
            "elapsed_s": self._clock.elapsed,
            "tokens_per_s": values["tokens"] / seconds,
            "trained_tokens_per_s": values["weight"] / seconds,
            "mfu": flops / seconds / self._peak if self._peak else None,
            "memory_gb": runtime.peak_memory_bytes() / 1e9,
        }
        if self._file:
            self._file.write(number, "train", line)
        self._view.update(number, line)

    def evaluation(self, number: int, found: Evaluation) -> None:
        line = dataclasses.asdict(found)
        if self._file:
            self._file.write(number, "eval", line)
        self._view.update(number, {"eval_loss": found.loss}, line=False)
        logging.info("step %d  held-out loss %.4f", number, found.loss)

    def close(self) -> None:
        self._view.close()
        if self._file:
            self._file.close()


def finish(run: Run) -> None:
    """The plot, the table and the answers."""
    answers = answer_prompts(
        run.config,
        run.job,
        run.base,
        run.chat,
        run.dataset,
        run.state.params,
        run.frozen,
    )
    if jax.process_index() > 0:
        return
    folder = run.folder.path
    lines = [x for x in metrics.read_metrics(folder) if x["kind"] == "train"]
    seconds = lines[-1]["elapsed_s"]
    facts = {
        "base model": run.base.name,
        "data": f"{run.dataset.rows.origin}, {len(run.dataset.rows.records)} rows",
        "steps": run.config.steps,
        "training time": duration(seconds),
        "tokens per second": round(sum(x["tokens"] for x in lines) / seconds),
        "peak memory, GB": round(lines[-1]["memory_gb"], 2),
    }
    report.plot(folder, folder.name)
    report.show_answers(run.console, answers)
    report.show_table(run.console, folder)
    report.write_markdown(folder, answers, facts)
    run.folder.mark_complete(facts)
    logging.info("%s", "  ".join(f"{k}: {v}" for k, v in facts.items()))
    logging.info(
        "done: %s/loss.png, %s/report.md; talk to it with\n"
        "  python -m research.generate --run=%s --compare",
        folder,
        folder,
        folder,
    )
