"""Saving and restoring with Orbax: state, data position, and whose they are."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from research.config import CheckpointConfig
from research.errors import UserError
from research.step import TrainState


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back.

    Attributes:
      step: optimizer updates it holds.
      state: in the shardings that were asked for.
      position: what `save` was given.
    """

    step: int
    state: TrainState
    position: dict[str, Any]


class Checkpointer:
    """Checkpoints of one run: the newest `keep_last`, and the `keep_best` by loss.

    Saving is asynchronous: the arrays are copied, training goes on, and `close`
    waits for the last save. Use as a context manager, so that no way out of a run
    leaves a save uncommitted.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        identity: dict[str, str],
        *,
        read_only: bool = False,
    ):
        keep = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(
                [
                    keep.LatestN(config.keep_last),
                    keep.BestN(
                        get_metric_fn=lambda metrics: metrics["loss"],
                        reverse=True,
                        n=config.keep_best,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            # Without it metrics are neither written nor read, whatever is preserved.
            best_fn=lambda metrics: metrics["loss"],
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            enable_async_checkpointing=True,
        )
        self._identity = identity
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_names=("state", "meta")
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """All kept steps, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The kept step with the lowest held-out loss, if one was measured."""
        metrics = {s: self._manager.metrics(s) for s in self.steps}
        losses = {step: found["loss"] for step, found in metrics.items() if found}
        return min(losses, key=losses.__getitem__) if losses else None

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        eval_loss: float | None,
    ) -> None:
        """Starts saving; a step that is already saved is left alone."""
        if step in self._manager.all_steps():
            return
        meta = {"identity": self._identity, "position": position}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
            metrics=None if eval_loss is None else {"loss": eval_loss},
        )

    def restore(
        self, abstract_state: TrainState, step: int | None = None
    ) -> Restored | None:
        """The checkpoint of `step`, by default the newest; None where there is none.

        Args:
          abstract_state: shapes, dtypes and shardings to restore into.

        Raises:
          UserError: it was saved over another base model, tokenizer or data set.
        """
        step = self.latest_step if step is None else step
        if step is None:
            return None
        meta = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
        check_identity(meta["identity"], self._identity, f"checkpoint {step}")
        state = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)),
        )["state"]
        logging.info("checkpoint: step %d restored", step)
        return Restored(step, state, meta["position"])


def check_identity(saved: dict[str, str], now: dict[str, str], what: str) -> None:
    """Raises UserError naming each part (base model, data ...) that differs."""
    odd = [
        f"  {part}: {saved.get(part)} -> {now[part]}"
        for part in now
        if saved.get(part) != now[part]
    ]
    if odd:
        raise UserError(
            f"{what} was made with something else:\n" + "\n".join(odd) + "\n"
            "give back what it was made with, or choose another --config.run_dir"
        )
