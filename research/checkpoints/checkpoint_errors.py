"""The errors of checkpoints: what happened to which step, and what to do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.core.errors import DamagedError, SaveError, UserError
from research.weights.parameter_paths import not_finite


def save_error(
    step: int, error: Exception, kept: Sequence[int], folder: Path
) -> SaveError:
    """For a save of `step` into `folder` that failed; `kept` are the steps there."""
    cause = f"{type(error).__name__}: {error}".partition("\n")[0]
    if len(cause) > 300:  # TensorStore puts a path first and the cause last.
        cause = f"{cause[:60]} ... {cause[-240:]}"
    return SaveError(
        f"step {step} could not be saved: {cause}; checkpoints left: "
        f"{', '.join(map(str, kept)) or 'none'}; make room or give back the right to "
        f"write {folder}, then start the same command again",
        step,
    )


def require_undamaged(step: int, folder: Path, damage: Sequence[str]) -> None:
    """Raises DamagedError if there is any damage."""
    if damage:
        raise DamagedError(
            f"checkpoint {step} in {folder} is damaged ({'; '.join(damage[:5])}): "
            "choose another step"
        )


def all_damaged(steps: Sequence[int], folder: Path) -> DamagedError:
    """For a folder in which no step can be used."""
    return DamagedError(
        f"all checkpoints in {folder} are damaged (steps "
        f"{', '.join(map(str, steps))}, see above); nothing was overwritten: restore a "
        "copy, or choose another --config.run_dir"
    )


def odd_numbers(state: Any) -> list[str]:
    """The damage of a tree of arrays that were read as they were written."""
    return [f"{path} holds a number that is not finite" for path in not_finite(state)]


def other_parameters(step: int, cause: str) -> UserError:
    """For a step of another tree of arrays than the one to read.

    `cause` begins with the path of an array that differs, if one is known.
    """
    cause = cause.strip().partition("\n")[0][:300]
    what, remedy = "parameters", "the model and LoRA shape"
    if cause.startswith("opt_state."):
        what, remedy = "optimizer state", "the config.optim"
    return UserError(
        f"checkpoint {step} holds other {what} than this run trains ({cause}); go back "
        f"to {remedy} of the run"
    )
