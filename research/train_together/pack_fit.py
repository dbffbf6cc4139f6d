"""The loop of several runs that are at one step: the same loop, with more to save."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.checkpoints.checkpointer import Checkpointer
from research.core.errors import DivergedError
from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.parallel import runtime
from research.runs.steering.control_requests import CHECKPOINT, SAMPLE
from research.runs.steering.request_listener import RequestListener
from research.runs.steering.stop_signals import StopRequest
from research.train import fit, loop, throughput
from research.train.device_batches import Feed
from research.train.evaluation import evaluate
from research.train.fit import Run
from research.train.metrics_log import StepLog
from research.train.step import train_step
from research.train_together import pack_arrays as arrays
from research.train_together import pack_step as together


@dataclasses.dataclass
class Member:
    """A run of a pack, restored.

    Attributes:
      position: in its data, None at the start.
      failed: why it takes no more part; its row of the step goes on unused.
    """

    run: Run
    checkpointer: Checkpointer
    position: dict[str, Any] | None
    failed: DivergedError | None = None


class Share(throughput.Clock):
    """One run's share of the steps' time; the pack's clock is the one that ticks."""

    def __init__(self, pack: throughput.Clock, runs: int, elapsed: float):
        super().__init__(elapsed)
        self._pack, self._runs = pack, runs

    def tick(self) -> None:
        self.last = self._pack.last / self._runs
        self.elapsed += self.last


class Feeds:
    """A batch of every run at once.

    Attributes:
      positions: of the first batches that were not handed out, one a run. They move
        together: a signal may come between two runs' batches.
      number: of the last batch, counted from 0.
    """

    def __init__(self, feeds: Sequence[Feed], to_devices: Callable[[Any], Any]):
        self._feeds, self._to_devices = feeds, to_devices
        self.positions = [feed.position for feed in feeds]

    @property
    def number(self) -> int:
        return self._feeds[0].number

    def __next__(self) -> Any:
        batches = self._to_devices([next(feed) for feed in self._feeds])
        self.positions = [feed.position for feed in self._feeds]
        return batches


@dataclasses.dataclass
class Place:
    """One run's position in `Feeds`, as a `Saver` asks for it."""

    feeds: Feeds
    index: int

    @property
    def position(self) -> dict[str, Any]:
        return self.feeds.positions[self.index]


class Pack:
    """Runs at one step, as one program."""

    def __init__(
        self,
        members: Sequence[Member],
        first: int,
        stop: StopRequest,
        at_once: int = 0,
    ):
        self.members, self._first, self._stop = members, first, stop
        runs = [member.run for member in members]
        self._config, definition = runs[0].config, runs[0].definition
        configs = [run.config for run in runs]
        self._mesh, self._frozen = definition.mesh, runs[0].frozen
        self._phases = runs[0].phases
        specs = definition.model.specs
        factors = arrays.union(specs, configs)
        groups = max(run.definition.groups for run in runs)
        self._group = together.make_group(
            self._config,
            dataclasses.replace(definition, groups=groups),
            factors,
            any(config.lora.dropout > 0 for config in configs),
            at_once,
        )
        self._own = [train_step.abstract_state(run.definition) for run in runs]
        numbers = arrays.stack([arrays.member(c, specs, factors) for c in configs])
        self._numbers = jax.device_put(numbers, meshes.replicated(definition.mesh))
        self._stack = {
            split: jax.jit(
                arrays.stack,
                out_shardings=together.batch_shardings(self._group, microbatched=split),
            )
            for split in (False, True)
        }
        self._clock = throughput.Clock()
        self._feeds = self._make_feeds()
        self._logs, self._savers = [], []
        self._last = first
        for index, member in enumerate(members):
            self._add_writers(index, member)

    def _add_writers(self, index: int, member: Member) -> None:
        run = member.run
        elapsed = (member.position or {"elapsed": 0.0})["elapsed"]
        clock = Share(self._clock, len(self.members), elapsed)
        log = StepLog(
            run.config,
            run.folder.path,
            run.console,
            clock,
            fit.count_flops(run),
            run.task.groups,
            self._first,
            run.phases,
            Path(run.config.run_dir).name,
        )
        place = Place(self._feeds, index)
        self._logs.append(log)
        self._savers.append(fit.Saver(run, member.checkpointer, log, place, clock))

    def _make_feeds(self) -> Feeds:
        config = self._config
        parts = fit.microbatches(config)
        mine = meshes.local_rows(self._mesh, config.data.batch_size, parts)
        feeds = [
            Feed(
                member.run.task.batches(mine),
                lambda batch: batch,
                member.run.history.skipped,
                self._phases,
                member.position,
                self._stop.wait,
            )
            for member in self.members
        ]
        return Feeds(feeds, lambda batches: self._on_mesh(batches, parts))

    def _on_mesh(self, batches: Sequence[Batch], parts: int | None = None) -> Batch:
        placed = [meshes.to_global(batch, self._mesh, parts) for batch in batches]
        return self._stack[parts is not None](placed)

    def fit(self) -> int:
        """Until the last step, a signal or nobody is left; returns the updates made.

        The `state` of every run that has not failed is then its last one.
        """
        config = self._config
        state = self._start()
        for member in self.members:
            member.run.history.resume_from(self._first)
        jitted = together.jit_train_step(self._group)
        step_fn = runtime.announce_first_call(jitted, "first step")
        answered = {
            m.run.folder.path: m.run.history.answer_request for m in self.members
        }
        with RequestListener(answered, self._mesh) as requests, self._stop.noting():
            try:
                state, done = loop.run(
                    state=state,
                    first=self._first,
                    total=config.steps,
                    feed=self._feeds,
                    step_fn=lambda state, batch: step_fn(
                        self._numbers, state, self._frozen, batch
                    ),
                    actions=self._actions(),
                    log=self._log,
                    resume_clock=self._clock.resume,
                    stop=self._stop,
                    requests=requests,
                    phases=self._phases,
                )
                with self._phases.during("save"):
                    for index, member in self._alive():
                        member.run.state = self._state_of(index, state)
                        self._savers[index].finish(done, member.run.state)
                requests.answer(done)
            except DivergedError:
                if self._alive():
                    raise
                done = self._last
            finally:
                for log in self._logs:
                    log.close()
        return done

    def _start(self) -> train_step.TrainState:
        wide = train_step.abstract_state(self._group.definition)
        shardings = together.stacked(train_step.state_shardings(self._group.definition))
        kind = self._group.definition.trainable.kind
        states = [arrays.widen(m.run.state, wide, kind) for m in self.members]
        return jax.device_put(arrays.stack(states), shardings)

    def _state_of(
        self, index: int, state: train_step.TrainState
    ) -> train_step.TrainState:
        return arrays.narrow(state, index, self._own[index])

    def _alive(self) -> list[tuple[int, Member]]:
        return [(i, m) for i, m in enumerate(self.members) if not m.failed]

    def _log(self, number: int, batch: int, sums: train_step.Metrics) -> None:
        found = jax.tree.map(np.asarray, sums)
        self._clock.tick()
        self._last = number
        for index, member in self._alive():
            mine = jax.tree.map(lambda x, i=index: x[i], found)
            write = self._savers[index].watching(self._logs[index])
            try:
                write(number, batch, mine)
            except DivergedError as error:
                logging.error("%s: %s", member.run.config.run_dir, error)
                member.failed = error
                if not self._alive():
                    raise

    def _evaluation(self) -> Callable[[int, train_step.TrainState], None]:
        rows = self._config.data.rows_per_pass
        mine = meshes.local_rows(self._mesh, rows)
        local = [member.run.task.held_out(rows, mine) for member in self.members]
        longest = max(map(len, local))
        batches = [
            self._on_mesh([_nth(own, number) for own in local])
            for number in range(longest)
        ]
        eval_fn = together.jit_eval_step(self._group)
        groups = self._group.definition.groups

        def action(number: int, state: train_step.TrainState) -> None:
            measured = self._measured_by(number)
            chosen = tuple(sorted(set(measured)))
            dispatched = [
                eval_fn(self._numbers, state.params, self._frozen, batch, chosen)
                for batch in batches
            ]
            found = []
            for sums in dispatched:
                found.append(jax.tree.map(np.asarray, sums))
                self._phases.sign_of_life()
            for index, member in self._alive():
                run, row = member.run, chosen.index(measured[index])
                result = evaluate(
                    lambda sums, i=row: {name: x[i] for name, x in sums.items()},
                    found,
                    [*run.task.groups, *[""] * (groups - len(run.task.groups))],
                    run.task.held_out_bytes,
                )
                run.evaluated = (number, result.loss)
                self._logs[index].evaluation(number, result)

        return action

    def _measured_by(self, number: int) -> list[int]:
        """For each run the index of the one whose evaluation stands for it.

        Before the first step that is the first of the same rows: adapters are an exact
        no-op then, as the doctor has seen, and all runs are the base model. Where all
        are one product the others cost little, and no second program is compiled.
        """
        every = list(range(len(self.members)))
        if number or self._group.at_once > 1:
            return every
        tasks = [id(member.run.task) for member in self.members]
        return [tasks.index(tasks[index]) for index in every]

    def _save(self, number: int, state: train_step.TrainState) -> None:
        for index, _ in self._alive():
            self._savers[index](number, self._state_of(index, state))

    def _actions(self) -> list[loop.Action]:
        config = self._config
        return [
            loop.Action("evaluate", config.eval.every, self._evaluation(), True),
            loop.Action(
                "save",
                config.checkpoint.every,
                self._save,
                request=CHECKPOINT,
                settle=self._settle,
            ),
            loop.Action(
                "sample",
                config.eval.samples_every or config.steps,
                self._sample,
                request=SAMPLE,
            ),
        ]

    def _settle(self) -> None:
        for index, _ in self._alive():
            self._savers[index].wait()

    def _sample(self, number: int, state: train_step.TrainState) -> None:
        for index, member in self._alive():
            fit.make_sampling(member.run)(number, self._state_of(index, state))


def _nth(batches: Sequence[Batch], number: int) -> Batch:
    """Batch `number`, or one that counts nothing."""
    if number < len(batches):
        return batches[number]
    last = batches[-1]
    return dataclasses.replace(last, weights=np.zeros_like(last.weights))
