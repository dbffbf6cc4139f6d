"""The runs that a user names to be served, and the names under which they answer."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from research.checkpoints.stored_steps import step_folders
from research.config.config_file import find_run
from research.config.saved_config import near_run
from research.core.errors import UserError
from research.core.hub_access import HubAddress, is_hub
from research.core.local_paths import expanded, holds_adapter, split_step
from research.formats.peft.find_adapter import find_adapter, names_adapter
from research.runs.aliases import run_alias
from research.runs.run_directory import RunDir

BASE = "base"  # The name of the model without an adapter.


@dataclasses.dataclass(frozen=True)
class RunAddress:
    """A checkpoint of a run, by the name that clients use.

    Attributes:
      name: the run's folder, with as many folders above it as tell it from the others;
        and `@STEP` where the user named a step.
      folder: of the run.
      step: `latest` (the newest, also of a run that is training), `best`, or a number;
        "" of an adapter folder of PEFT, which has no steps.
      alias: the folder of the alias that stood for this checkpoint; "" without one.
    """

    name: str
    folder: Path
    step: str
    alias: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it is an adapter folder of PEFT, and no run."""
        return not self.step

    def now(self) -> "RunAddress":
        """The address that the same name has now: an alias can be moved.

        Raises:
          UserError: the alias stands for nothing that is there.
        """
        if not self.alias:
            return self
        folder, step = run_alias.target(Path(self.alias))
        return dataclasses.replace(self, folder=folder, step=str(step))


def run_addresses(
    written: Sequence[str], flag: str = "--run", *, with_folders: bool = False
) -> list[RunAddress]:
    """The runs of `RUN`, `RUN@STEP`, aliases, and folders of runs, as that of a sweep.

    A run in such a folder that has no checkpoint yet is passed over with a warning.
    With `with_folders` an adapter of PEFT may stand for a run: its folder, or its
    address on the hub. Messages name `flag`.

    Raises:
      UserError: there is no such run, it has no checkpoint, or it is named twice.
    """
    found: list[tuple[Path, str]] = []
    on_hub: dict[Path, Path] = {}
    for given in written:
        place, step = split_step(given)
        if with_folders and not step and names_adapter(place):
            folder = find_adapter(place)
            found.append((folder, ""))
            if is_hub(place):  # Its folder in the cache is named by a checksum.
                on_hub[folder] = Path(HubAddress.parse(place, "model").name)
            continue
        folder = Path(expanded(find_run(place)))
        if run_alias.is_alias(folder):
            if step:
                raise UserError(f"{flag}={given}: an alias has one step; give {place}")
            found.append((folder, ""))
        elif RunDir(folder).exists:
            if not step_folders(folder / "checkpoints"):
                raise UserError(f"{flag}={given}: {folder} has no checkpoint yet")
            found.append((folder, step))
        else:
            found += [(member, step) for member in _members(f"{flag}={given}", folder)]
    twice = [x for i, x in enumerate(found) if x in found[:i]]
    if twice:
        raise UserError(f"{flag} names {twice[0][0]} twice; name it once")
    names = _names([on_hub.get(folder, folder) for folder, _ in found])
    return [
        _address(name, folder, step)
        for name, (folder, step) in zip(names, found, strict=True)
    ]


def _address(name: str, folder: Path, step: str) -> RunAddress:
    if holds_adapter(folder):
        return RunAddress(name, folder, "")
    if run_alias.is_alias(folder):
        return RunAddress(name, folder, "", str(folder)).now()
    return RunAddress(f"{name}@{step}" if step else name, folder, step or "latest")


def _members(given: str, folder: Path) -> list[Path]:
    """The runs in `folder` that have a checkpoint."""
    runs = [x for x in sorted(folder.glob("*")) if RunDir(x).is_run]
    ready = [x for x in runs if step_folders(x / "checkpoints")]
    if not runs:
        beside = folder.parent.glob("*")
        known = sorted(str(x) for x in beside if RunDir(x).is_run)
        there = f"; there are {', '.join(known[:8])}" if known else ""
        raise UserError(
            f"{given}: {folder} is no run directory and holds none"
            f"{near_run(folder)}{there}"
        )
    if not ready:
        raise UserError(f"{given}: none of its {len(runs)} runs has a checkpoint")
    if waiting := [x.name for x in runs if x not in ready]:
        logging.warning(
            "%s: no checkpoint yet, not served: %s", folder, ", ".join(waiting)
        )
    return ready


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, and none is `BASE`."""
    parts = [folder.absolute().parts for folder in folders]

    def name(own: tuple[str, ...]) -> str:
        others = {x for x in parts if x != own}
        for count in range(1, len(own) + 1):
            end = own[-count:]
            if end != (BASE,) and all(x[-count:] != end for x in others):
                return "/".join(end)
        return "/".join(own)

    return [name(own) for own in parts]
