"""Exports of runs: the formats that there are, and those that lie on this disk."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from research.checkpoints.stored_steps import size_of, step_folders
from research.config.choices import EXPORT_FORMATS
from research.core.errors import UserError
from research.core.json_files import read_json
from research.formats.export_names import EXPORTED, EXPORTS, ORIGIN, is_unfinished
from research.studio.jobs.job_commands import python
from research.studio.roots import shown_paths

SHAPE = {"step": int, "dtype": str}


@dataclasses.dataclass(frozen=True)
class ExportChoice:
    """A form in which a model can be written.

    Attributes:
      name: short, in addresses and in the name of the folder.
      title: for people.
      flags: of `research.export`.
    """

    name: str
    title: str
    flags: tuple[str, ...]


def known_formats() -> tuple[ExportChoice, ...]:
    """The formats that `research.export` writes, with the numbers of each."""
    return tuple(
        ExportChoice(
            f"{name}-{numbers}",
            f"{format.title}, {numbers}",
            (f"--format={name}", f"--{flag}={numbers}"),
        )
        for name, format in EXPORT_FORMATS.items()
        for flag, choices in (("dtype", format.dtypes), ("quant", format.quants))
        for numbers in choices
    )


def name_of_choice(format: str = "", dtype: str = "", quant: str = "") -> str:
    """The name of the choice that flags of `research.export` make."""
    format = format or next(iter(EXPORT_FORMATS))
    usual = [x.dtypes[0] for x in (EXPORT_FORMATS.get(format),) if x]
    return "-".join([format, *([quant or dtype] if quant or dtype else usual)])


@dataclasses.dataclass(frozen=True)
class FoundExport:
    """An export on this disk.

    Attributes:
      folder: with its files.
      facts: what it says of itself, such as its step.
      size: bytes.
      problem: why it cannot be read.
    """

    folder: Path
    facts: dict[str, Any]
    size: int
    problem: str = ""

    @property
    def verified(self) -> str:
        """How it compares with the model of the run, where its format says so."""
        found = self.facts.get("verified")
        count = len(self.facts.get("files", ()))
        return str(found) if found else f"not compared; {count} files with checksums"


def exporting(run: Path, step: str, format: str) -> tuple[list[str], Path]:
    """The command that writes a run in a format, and the folder that it makes.

    Raises:
      UserError: there is no such format or step.
    """
    (chosen, *_) = [x for x in known_formats() if x.name == format] or [None]
    if chosen is None:
        known = ", ".join(x.name for x in known_formats())
        raise UserError(f"format={format[:40]!r}; there are {known}")
    require_step(run, step)
    out = run / EXPORTS / f"{step}-{format}"
    written, place = shown_paths([run, out])
    flags = [f"--run={written}", f"--step={step}", f"--out={place}", *chosen.flags]
    return [python(), "-m", "research.export", *flags], out


def require_step(run: Path, step: str) -> None:
    """Raises UserError if the run has no checkpoint `step`: a number or best."""
    steps = [path.name for path in step_folders(run / "checkpoints")]
    if not steps or (step not in steps and step != "best"):
        raise UserError(
            f"step {step[:40]!r}: {run.name} has "
            f"{', '.join([*steps, 'best']) if steps else 'no checkpoint yet'}"
        )


def newest(run: Path) -> str:
    """The newest step of a run as a number; empty without a checkpoint."""
    steps = step_folders(run / "checkpoints")
    return steps[-1].name if steps else ""


def find_exports(run: Path) -> Iterator[FoundExport]:
    """The exports in a run directory."""
    folders: Sequence[Path] = sorted((run / EXPORTS).glob("*"))
    for folder in (run / EXPORTED, *folders):
        if not folder.is_dir() or is_unfinished(folder.name):
            continue
        try:
            facts = read_json(folder / ORIGIN, SHAPE, "export again")
            yield FoundExport(folder, facts, size_of(folder))
        except (UserError, OSError) as error:
            yield FoundExport(folder, {}, 0, str(error))
