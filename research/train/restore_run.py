"""A run resumes: its newest intact checkpoint, or the start where nothing was saved."""

import dataclasses
import functools
from typing import Any

from research.checkpoints.checkpointer import Checkpointer
from research.core.errors import DamagedError, DivergedError, UserError
from research.core.visible_text import counted
from research.train.programs.device_batches import first_batches
from research.train.step import train_step
from research.train.step.definition_from_config import load_start
from research.train.training_run import TrainingRun


@dataclasses.dataclass
class RestoredRun:
    """A run whose state is that of its newest checkpoint.

    Attributes:
      position: where its data resumes; None at the start.
      diverged: why it takes no further part. Its slot of the program stays unused.
    """

    run: TrainingRun
    checkpointer: Checkpointer
    position: dict[str, Any] | None
    diverged: DivergedError | None = None


def restore(
    run: TrainingRun, checkpointer: Checkpointer
) -> tuple[int, dict[str, Any] | None]:
    """Puts the newest intact checkpoint into `run.state`.

    Returns step 0 only where nothing was ever saved: taking the loss of all checkpoints
    for a fresh start would overwrite what could still be rescued.

    Returns:
      The step of the checkpoint and the position of its data.

    Raises:
      UserError: it has made more steps than the config asks for.
      DamagedError: there were checkpoints, and none can be used.
    """
    if checkpointer.latest_step is not None:
        run.state = None  # Room for the one that is read.
    restored = checkpointer.restore(train_step.abstract_state(run.definition))
    if restored:
        run.state = restored.state
        if restored.step > run.config.steps:
            raise UserError(
                f"{run.folder.path} has made {counted(restored.step, 'step')}, and "
                f"this config is {run.config.steps}: raise config.steps to at least "
                f"{restored.step}, or config.epochs"
            )
        return restored.step, restored.position
    if run.history.saved or checkpointer.has_set_aside:
        raise DamagedError(
            f"step {run.history.saved} was saved, as {run.folder.history} says, and "
            f"{run.folder.checkpoints} has no checkpoint: bring one back, or remove "
            f"{run.folder.path} to begin anew"
        )
    if run.state is None:
        params, run.frozen = load_start(
            run.definition,
            run.base,
            continued=run.config.lora,
            first_batches=functools.partial(
                first_batches, run.config, run.definition, run.task
            ),
        )
        run.state = train_step.jit_init(run.definition)(params)
    return 0, None
