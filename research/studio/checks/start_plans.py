"""Memory, time and cost of a start, here and elsewhere, from processes that plan it."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from research.core.errors import UserError
from research.core.json_files import NUMBER, read_json
from research.report.plan_tables import DeviceTable, PlanData, tabulate_devices
from research.studio.checks.page_process import PageProcess, PageProcesses
from research.studio.jobs.job_commands import launching_on, planning

FILE = "plan.json"
MOST_DEVICES = 12
DEVICE = re.compile(r"[A-Za-z0-9_.-]+(:[0-9x]+)?")
DEVICES = "here\nl4\nh100\nv5e:1x1"
OWN = "launch."  # before the name of a target in a field with its flags
# The targets of `launch` that are not this machine, with flags to begin from.
TARGETS = {
    "slurm": "--gpus-per-node=1 --device=h100",
    "tpu-vm": "--zone=us-west4-a --type=v5litepod-1 --bucket=gs://my-bucket",
    "gke": "--topology=v5e:1x1 --image=registry/name:tag --volume=runs:/runs",
    "skypilot": "--accelerators=L4:1 --bucket=gs://my-bucket",
}
USE = {"seconds": NUMBER, "tokens_per_second": NUMBER, "days": NUMBER}
USE |= {"chip_hours": NUMBER}
PLAN = {
    "target": str,
    "fits": bool,
    "hbm_needed": NUMBER,
    "hbm_usable": NUMBER,
    "steps": int | None,
    "advice": str,
    "notes": [str],
    "best": USE,
    "not_overlapped": USE,
}


@dataclasses.dataclass(frozen=True)
class PricedDevices:
    """Kinds of chips, and the price of an hour of one chip where it is known."""

    names: tuple[str, ...]
    prices: tuple[float | None, ...]

    @classmethod
    def from_text(cls, text: str) -> "PricedDevices":
        """Reads a line for each kind, as `h100:8 2.50`.

        Raises:
          UserError: a line is something else.
        """
        names: list[str] = []
        prices: list[float | None] = []
        for line in filter(None, map(str.strip, text.splitlines())):
            name, *price = line.split()
            try:
                amount = float(price[0]) if price else None
                fits = DEVICE.fullmatch(name) and len(price) < 2
                fits = fits and (amount is None or 0 <= amount < 1e6)
            except ValueError:
                fits = None
            if not fits:
                raise UserError(
                    f"{line[:80]!r} is no kind of chip: write one in a line, as "
                    "h100:8, v5e:2x4, 24GB, cpu or here, then the price of an hour of "
                    "one chip if you know it"
                )
            names.append(name)
            prices.append(amount)
        if not 0 < len(names) <= MOST_DEVICES:
            raise UserError(
                f"name 1 to {MOST_DEVICES} kinds of chips, not {len(names)}"
            )
        return cls(tuple(names), tuple(prices))


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan as its files tell it.

    Attributes:
      state: `absent`, `running`, `ended` (it has a table) or `failed`.
      table: a row for each kind of chips.
      problem: why it has failed.
    """

    state: str = "absent"
    table: DeviceTable = dataclasses.field(default_factory=list)
    problem: str = ""


class StartPlans:
    """Plans and dry runs of a studio, each in a process of its own."""

    def __init__(self, folder: Path):
        self._plans = PageProcesses(folder / "plans")
        self._launches = PageProcesses(folder / "dry-runs")

    def plan_command(self, flags: Sequence[str], devices: PricedDevices) -> list[str]:
        """The command that plans the trainer's `flags` on these chips."""
        return planning(flags, devices.names, self._plan(flags, devices) / FILE)

    def start_plan(self, flags: Sequence[str], devices: PricedDevices) -> None:
        """Starts it."""
        command = self.plan_command(flags, devices)
        self._plans.start(self._plan(flags, devices), command)

    def read_plan(self, flags: Sequence[str], devices: PricedDevices) -> Planned:
        """Its results, as far as it has come."""
        place = self._plan(flags, devices)
        found = self._plans.look(place)
        if found.state != "ended":
            return Planned(found.state)
        if not (place / FILE).is_file():
            return Planned("failed", problem=found.problem)
        try:
            plans = read_json(place / FILE, _shape, "plan again")
            plans = plans if isinstance(plans, list) else [plans]
            return Planned("ended", tabulate_devices(plans, devices.prices))
        except UserError as error:
            return Planned("failed", problem=str(error))

    def dry_run(self, target: str, own: str, flags: Sequence[str]) -> list[str]:
        """The command that shows a launch and does nothing.

        Args:
          target: one of `TARGETS`.
          own: its flags, as a shell reads them.
          flags: of the trainer.

        Raises:
          UserError: there is no such target, or these are no flags.
        """
        return launching_on(target, ["--dry-run", *_own(target, own)], flags)

    def launch(self, target: str, own: str, flags: Sequence[str]) -> list[str]:
        """The command of the launch itself. Raises what `dry_run` raises."""
        return launching_on(target, _own(target, own), flags)

    def start_dry_run(self, target: str, own: str, flags: Sequence[str]) -> None:
        """Starts it. Raises what `dry_run` raises."""
        command = self.dry_run(target, own, flags)
        self._launches.start(self._launches.place(command[1:]), command)

    def read_dry_run(self, target: str, own: str, flags: Sequence[str]) -> PageProcess:
        """Its output, as far as it has come. Raises what `dry_run` raises."""
        command = self.dry_run(target, own, flags)
        return self._launches.look(self._launches.place(command[1:]))

    def _plan(self, flags: Sequence[str], devices: PricedDevices) -> Path:
        return self._plans.place([*devices.names, "--", *flags])


def _own(target: str, text: str) -> list[str]:
    if target not in TARGETS:
        raise UserError(f"{target!r} is none of {', '.join(TARGETS)}")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"flags of {target}: {error}") from error
    if strange := [word for word in words if not re.match(r"--\w", word)]:
        raise UserError(
            f"{strange[0]!r} is no flag of {target}: write --NAME=VALUE; flags of the "
            "trainer belong to the form of its knobs"
        )
    return words


def _shape(value: object) -> object:
    """One plan, or several, of which some have a problem."""

    def each(plan: PlanData) -> object:
        has_problem = isinstance(plan, dict) and "problem" in plan
        return {"target": str, "problem": str} if has_problem else PLAN

    return [each] if isinstance(value, list) else each
