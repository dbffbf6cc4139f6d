"""Saving and restoring with Orbax: any tree of arrays, data position and identity."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from research.checkpoints.checkpoint_errors import (
    all_damaged,
    odd_numbers,
    other_parameters,
    require_undamaged,
    save_error,
)
from research.checkpoints.checkpoint_listing import (
    METRICS,
    make_metrics,
    measured_costs,
    refuse_other_identity,
)
from research.checkpoints.checksums import find_damage
from research.checkpoints.orbax_manager import (
    Manager,
    find_other_shape,
    open_manager,
)
from research.checkpoints.restored_step import Restored
from research.checkpoints.run_identity import Identity, check_identity
from research.checkpoints.stored_steps import step_folders
from research.config.knob_groups import CheckpointConfig
from research.core.errors import SaveError, UserError
from research.parallel import agreement

POLL = 0.02  # seconds between two looks at a pending save
RESTORED = "checkpoint: step %d restored from %s"


class Checkpointer:
    """Checkpoints of one run: the newest `keep_last`, and the `keep_best` by loss.

    Saving is asynchronous: the arrays are copied, and training continues. `wait` waits
    for the last save; leaving the context waits, too. Checkpoints that are damaged or
    not finite are moved to `damaged/` beside the folder, and the newest other is used.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        identity: Identity,
        *,
        accept: Collection[str] = (),
        report: Callable[[str], None] = logging.warning,
        committed: Callable[[int], None] = lambda step: None,
        read_only: bool = False,
        measured_on: str = "",
    ):
        """Args:
        folder: holds all checkpoints.
        config: how many are kept.
        identity: fingerprints that a checkpoint must have been saved with.
        accept: parts of the identity that may differ.
        report: called with messages that a person should read.
        committed: called with each step once it is committed to disk.
        read_only: nothing is written, moved or removed.
        measured_on: a mark of the held-out rows; only losses on the same rows are
          compared. By default the data of the identity.
        """
        self._folder, self._shown = folder.absolute(), folder.parent
        self._aside = self._folder.parent / "damaged"
        self._config = config
        self._identity, self._run = identity, identity.get("run", "")
        self._data = measured_on or identity.get("data", "")
        self._accept = accept
        self._report = report
        self._committed = committed
        self._read_only = read_only
        self._pending: int | None = None
        # The failure of this process. Orbax raises it only when all processes meet.
        self._failed: Exception | None = None
        self._lost: list[int] = []  # Steps set aside before Orbax opened the rest.
        self._manager = self._open()
        # In memory, so that all processes rank a new step alike.
        self._ranked = self._folder, self._data, self._run, config.best_by
        self._costs = {} if read_only else measured_costs(*self._ranked)

    def _open(self) -> Manager:
        first = jax.process_index() == 0
        try:
            agreement.together(
                lambda: first and refuse_other_identity(self._folder, self._run)
            )
            if not self._read_only:
                self._set_unreadable_aside()
            return open_manager(
                self._folder,
                self._config,
                self._data,
                self._fail,
                read_only=self._read_only,
            )
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot be used for checkpoints: {error}; give back "
                "the right to read and write it, or choose another --config.run_dir"
            ) from error

    def _set_unreadable_aside(self) -> None:
        """Moves steps with damaged metrics away, since Orbax reads all metrics.

        Orbax would fail, or choose the best step by a wrong loss. The first process
        checks; the others then open what is left.
        """
        damaged: dict[int, list[str]] = {}
        if jax.process_index() == 0:
            steps = [int(path.name) for path in step_folders(self._folder)]
            damaged = {s: problems for s in steps if (problems := self._misjudged(s))}
        for step, problems in damaged.items():
            self._move_aside(step, problems)
        self._lost += agreement.of_first(list(damaged))

    def _misjudged(self, step: int) -> list[str]:
        """The damage to the file with the held-out loss of `step`."""
        return find_damage(self._folder / str(step), item=METRICS, run=self._run)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        try:
            self.wait()
        except SaveError as failed:
            if error is None:
                raise
            # The first error is raised; this one must not get lost either.
            self._report(str(failed))
        finally:
            # Closing waits for the other processes, which do not know of the failure.
            if not (self._failed and jax.process_count() > 1):
                with contextlib.suppress(Exception):  # A failure is already reported.
                    self._manager.close()

    @property
    def has_set_aside(self) -> bool:
        """Whether a damaged checkpoint of this run was ever moved away."""
        return self._aside.is_dir()

    @property
    def steps(self) -> list[int]:
        """All kept steps, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest kept step, intact or not; None if there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The kept step that `checkpoint.best_by` ranks first, if one was measured."""
        costs = measured_costs(*self._ranked)
        return min(costs, key=costs.__getitem__) if costs else None

    def is_among_best(self, step: int, cost: float) -> bool:
        """Whether `step` is not saved, and its cost is among the lowest `keep_best`."""
        steps = self.steps
        better = sum(x <= cost for s, x in self._costs.items() if s in steps)
        return step not in steps and better < self._config.keep_best

    def save(
        self,
        step: int,
        state: Any,
        position: dict[str, Any],
        eval_loss: float | None,
        cost: float | None = None,
    ) -> None:
        """Starts to save, unless the step is already saved.

        Args:
          step: optimizer updates that `state` holds.
          state: a tree of arrays.
          position: the data position, as JSON.
          eval_loss: its held-out loss on the rows of `measured_on`, if it was measured.
          cost: of its answers by `checkpoint.best_by`, if they were measured.

        Raises:
          SaveError: this save could not begin, or the one before it failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        meta = {"identity": self._identity, "position": position}
        metrics, self._costs[step] = make_metrics(
            eval_loss, cost, self._data, self._config.best_by
        )
        with self._naming(step):
            self._forget_removed()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                metrics=metrics,
            )
            self._pending = step

    def _forget_removed(self) -> None:
        """Reports checkpoints that somebody removed while the run trained."""
        gone = [s for s in self.steps if not (self._folder / str(s)).is_dir()]
        if gone or not self._folder.is_dir():
            steps = ", ".join(map(str, gone)) or "none was saved yet"
            self._report(f"checkpoints were removed from {self._folder}: {steps}")
            self._folder.mkdir(exist_ok=True)
            self._manager.reload()

    def check(self) -> None:
        """Finishes a save that has ended; does not wait for one that is under way.

        Raises:
          SaveError: the save failed.
        """
        if self._pending is None:
            return
        if self._failed or not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed to disk.

        Raises:
          SaveError: the save failed. Its files are removed; older steps are unchanged.
        """
        if self._pending is None:
            return
        step = self._pending
        with self._naming(step):
            self._wait_for_own()
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if not (self._folder / str(step)).is_dir():
                raise OSError("Orbax reports success, but the checkpoint is not there")
        self._pending = None
        self._committed(step)

    def _fail(self, error: Exception) -> None:
        self._failed = error

    def _wait_for_own(self) -> None:
        """With several processes, raises a failure of this one as soon as it happens.

        Orbax raises it only behind a barrier, where all others wait for this process.
        """
        while jax.process_count() > 1 and self._manager.is_saving_in_progress():
            if self._failed:
                raise self._failed
            time.sleep(POLL)

    @contextlib.contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        """Turns any error of a save of `step` into a SaveError, and cleans up."""
        try:
            yield
        except Exception as error:  # TensorStore, Orbax and the disk raise many kinds.
            self._pending = None
            self._reopen(step)
            raise save_error(step, error, self.steps, self._folder) from error

    def _reopen(self, step: int) -> None:
        """Replaces a failed manager, which lists torn steps and has dead threads."""
        if jax.process_count() > 1:
            return  # Orbax would wait for the others, and this process ends at once.
        if not self._folder.is_dir():
            return  # It was moved or removed, and Orbax would make it anew.
        with contextlib.suppress(Exception):
            self._manager.close()
        if jax.process_index() == 0:
            for torn in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(torn, ignore_errors=True)
        self._failed = None
        with contextlib.suppress(UserError):
            self._manager = self._open()

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """Reads the checkpoint of `step`, by default the newest that can be used.

        Args:
          abstract_state: shapes, dtypes and shardings to restore into.
          step: None takes the newest that is intact and finite.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          DamagedError: the requested checkpoint is damaged or not finite, or all are.
          UserError: it was saved over another base model, tokenizer or dataset, or
            for parameters of other shapes.
        """
        if step is not None:
            restored, damage = self._try(step, abstract_state)
            require_undamaged(step, self._folder, damage)
            return restored
        known = sorted({*self._lost, *self.steps})
        while (step := self.latest_step) is not None:
            restored, damage = self._try(step, abstract_state)
            if not damage:
                return restored
            restored = None  # Room for the one before.
            self._set_aside(step, damage)
        if known:
            raise all_damaged(known, self._folder)
        return None

    def restore_part(
        self, step: int, abstract_part: dict[str, Any], *, check: bool = True
    ) -> dict[str, Any]:
        """Reads only some entries of the saved tree; the others take no memory.

        Args:
          step: of the checkpoint. All its files are checked first, in small portions;
            without `check` they have been before.
          abstract_part: entry of the saved tree -> shapes, dtypes and shardings. A
            dtype that differs from the saved one casts.

        Raises:
          DamagedError: the checkpoint is damaged, or what is read is not finite.
          UserError: it was saved over another base model or tokenizer, or for
            parameters of other shapes.
        """
        if check:
            require_undamaged(step, self._folder, self.damage(step))
        self._meta(step)
        if other := find_other_shape(self._folder / str(step), abstract_part):
            raise other_parameters(step, other)
        as_saved = ocp.checkpoint_utils.construct_restore_args(abstract_part)
        wanted = ocp.args.PyTreeRestore(abstract_part, as_saved, partial_restore=True)
        part = self._restore_state(step, wanted)
        if check:  # Otherwise it is one more part of a checkpoint that is named.
            logging.info(RESTORED, step, self._shown)
        require_undamaged(step, self._folder, odd_numbers(part))
        return part

    def damage(self, step: int) -> list[str]:
        """The damage to the files of `step`; each process reads its share of them."""
        index, count = jax.process_index(), jax.process_count()
        mine = find_damage(self._folder / str(step), index, count, run=self._run)
        if agreement.everywhere(not mine):
            return mine
        return mine or ["another process found damage in its share of the files"]

    def _set_aside(self, step: int, damage: list[str]) -> None:
        """Moves a checkpoint out of reach of every restore, and reports it."""
        if self._read_only:
            require_undamaged(step, self._folder, damage)
        first = jax.process_index() == 0
        agreement.together(lambda: first and self._move_aside(step, damage))
        self._manager.reload()

    def _move_aside(self, step: int, damage: list[str]) -> None:
        target = self._aside / f"{step}-{time.time_ns():x}"
        target.parent.mkdir(exist_ok=True)
        (self._folder / str(step)).rename(target)
        self._report(
            f"checkpoint {step} is damaged and was moved to {target}: "
            + "; ".join(damage[:5])
            + (f"; and {len(damage) - 5} more" if len(damage) > 5 else "")
        )

    def _try(self, step: int, abstract_state: Any) -> tuple[Restored | None, list[str]]:
        """Reads `step`, and lists its damage."""
        if damage := self.damage(step):
            return None, damage
        meta = self._meta(step)
        state = self._restore_state(step, ocp.args.StandardRestore(abstract_state))
        logging.info(RESTORED, step, self._shown)
        return Restored(step, state, meta["position"]), odd_numbers(state)

    def _meta(self, step: int) -> dict[str, Any]:
        """Reads identity and position saved with `step`, and checks the identity."""
        meta = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
        what = f"checkpoint {step}"
        check_identity(meta["identity"], self._identity, what, self._accept)
        return meta

    def _restore_state(self, step: int, request: ocp.args.CheckpointArgs) -> Any:
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(state=request))
        except ValueError as error:  # Orbax raises it for other shapes or trees.
            whole = isinstance(request, ocp.args.StandardRestore)
            other = find_other_shape(self._folder / str(step), request.item, whole)
            raise other_parameters(step, other or str(error)) from error
        return items["state"]
