"""The doctor without a training: `python -m research.studio.checks`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.config import command_line
from research.config.knobs import knob
from research.config.run_config import Config
from research.core.errors import UserError

if TYPE_CHECKING:
    from research.train import doctor

USAGE = """
python -m research.studio.checks --into=FOLDER [--rows_only] --config=FILE.py
    [--config.KNOB=VALUE ...]

Reads the data and the model of a run as `research.train` does before its first step,
writes the doctor's findings and the first training rows into FOLDER, and trains
nothing. The run directory is not touched. With --rows_only it also writes rows.json:
lengths, copies, dropped rows, and training rows one by one.
"""


@dataclasses.dataclass(frozen=True)
class CheckFlags:
    into: str = knob("", "folder for doctor.json and preview.json", is_path=True)
    rows_only: bool = knob(False, "look at the rows; no parameter is read")
    first: int = knob(0, "with rows_only, the first row that rows.json shows", low=0)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 may start, 1 a finding forbids it."""
    config, f = command_line.parse_with_config(argv, USAGE, CheckFlags)
    if not f.into:
        raise UserError("--into=FOLDER is missing: where the findings are written")
    # Imported late: importing JAX takes longer than saying what is wrong with a flag.
    from research.train import doctor

    folder = Path(f.into)
    folder.mkdir(parents=True, exist_ok=True)
    found = _rows(config, folder, f.first) if f.rows_only else _start(config)
    doctor.save(folder, found)
    bad = [finding for finding in found.findings if not finding.ok]
    for finding in bad:
        sys.stderr.write(f"{finding.name}: {finding.text}\n  {finding.remedy}\n")
    return 1 if bad else 0


def _rows(config: Config, folder: Path, first: int) -> "doctor.Examination":
    """Examines the rows alone, and writes what a page shows of them."""
    from research.runs.lineage.base_of_run import open_start
    from research.runs.run_directory import RunDir
    from research.studio.checks.row_survey import BLOCK, summed_up, write_survey
    from research.tasks import task_registry
    from research.train import doctor

    base = open_start(config, RunDir(config.run_dir))
    task = task_registry.load_task(config, base)
    if page := task_registry.find_kind(config).browse(config, base, first, BLOCK):
        found = summed_up(page, task.left_out, config.data.seq_len)
        write_survey(folder, found)
    return doctor.Examination(task.examine(), task.preview(doctor.PREVIEW_ROWS))


def _start(config: Config) -> "doctor.Examination":
    """Examines all that a start reads."""
    from research.parallel import runtime
    from research.runs.phase_timer import PhaseTimer
    from research.runs.run_directory import RunDir
    from research.train import doctor, prepare_runs

    runtime.start(config.runtime)
    folder = RunDir(config.run_dir)
    opened = prepare_runs.OpenedFolder(config, folder, folder.check_config(config))
    try:
        phases = PhaseTimer(runtime.process_age())
        (run,) = prepare_runs.prepare([opened], phases)
    except doctor.UnhealthyError as error:
        return error.examination
    return run.examination


if __name__ == "__main__":
    command_line.run(main)
