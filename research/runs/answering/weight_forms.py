"""The forms that a base model's weights can have while it answers."""

from typing import Any

from research.config.knobs import knob

PLAIN, INT8 = WEIGHTS = "plain", "int8"


def weights_knob() -> Any:
    """The flag `--weights` of every command that answers."""
    return knob(
        PLAIN,
        "int8: the base in one byte a weight, faster, and the log says what that does "
        "to its loss; plain: in the dtype of the run",
        choices=WEIGHTS,
    )
