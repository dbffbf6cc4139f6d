"""Steps that other runs are built on; training and `prune` do not remove them.

Adapters are of no use without the weights that they were added to. So a run of adapters
leaves a file in the run that it starts from. The file counts while that other run is
there and still starts from that step. So does an alias such as `prod`, for the step
that it stands for.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from research.checkpoints.run_identity import BASE_RUN, BASE_STEP, Identity
from research.core.atomic_files import make_folder, write_whole
from research.core.errors import UserError
from research.core.json_files import read_json

PINS = "needed_by"  # The folder of these files, in the run directory of the base.
SHAPE = {"folder": str, BASE_RUN: str, BASE_STEP: str}
IDENTITY = "identity.json"


def need_step(
    base: Path, needing: Path, identity: Identity, said_in: str = IDENTITY
) -> None:
    """Records in the run `base` that what is in `needing` is built on one of its steps.

    Args:
      base: run directory.
      needing: run directory, or an alias.
      identity: of the run in `needing`; it names the step.
      said_in: the file in `needing` that says so as long as it does: an identity, or
        `needs`, a list of several.

    Raises:
      OSError: `base` cannot be written.
    """
    folder = str(needing.absolute())
    pin = {"folder": folder, **{x: identity[x] for x in (BASE_RUN, BASE_STEP)}}
    make_folder(base / PINS)
    one = folder
    if said_in != IDENTITY:
        pin, one = pin | {"said_in": said_in}, f"{folder}@{pin[BASE_STEP]}"
    name = hashlib.sha256(one.encode()).hexdigest()[:16]
    write_whole(base / PINS / f"{name}.json", json.dumps(pin, indent=2))


def needed_steps(base: Path) -> dict[int, str]:
    """The steps of the run in `base` that other runs are built on.

    Returns:
      The folder of a run that needs it, by step.
    """
    found = {}
    for file in sorted((base / PINS).glob("*.json")):
        try:
            pin = read_json(file, SHAPE, "remove it")
            if pin[BASE_STEP].isdecimal() and _is_needed(pin):
                found[int(pin[BASE_STEP])] = pin["folder"]
        except UserError as error:
            logging.warning("%s", error)
    return found


def _is_needed(pin: Mapping[str, str]) -> bool:
    """Whether the run is there, and starts from the step; True if it cannot be read."""
    try:
        file = Path(pin["folder"]) / pin.get("said_in", IDENTITY)
        found = json.loads(file.read_bytes())
        return any(
            all(needed.get(x) == pin[x] for x in (BASE_RUN, BASE_STEP))
            for needed in found.get("needs", [found])
        )
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, AttributeError):
        return True
