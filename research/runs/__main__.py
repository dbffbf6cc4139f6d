"""Asks a running job for something: `python -m research.runs --run=RUN_DIR stop`."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError
from research.runs.control.request_files import (
    KINDS,
    answer_to,
    withdraw,
    write_request,
)

if TYPE_CHECKING:
    from research.runs.run_directory import RunDir

USAGE = """
python -m research.runs --run=RUN_DIR stop|checkpoint|sample [--wait=SECONDS]

stop        end the run after the step in hand; it is saved, and resumes when
            research.train is called again
checkpoint  save now
sample      let the model answer now; the answers are added to samples.jsonl

The request is a file in RUN_DIR/requests. All processes of the job act on it at the
same boundary between two steps, and run.json keeps the answer. This command waits for
it, and withdraws the request when --wait is over.
"""
LOOK_EVERY = 0.2  # seconds


@dataclasses.dataclass(frozen=True)
class RequestFlags:
    """The flags of `python -m research.runs`."""

    verb: str = knob("", "the request", choices=("", *KINDS))
    run: str = knob(
        "",
        "run directory, its config.json or config file",
        is_path=True,
    )
    wait: float = knob(600.0, "seconds to wait for the answer", low=0)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 when the job has done what was requested."""
    f = command_line.parse(argv, USAGE, RequestFlags)
    kind = f.verb
    if not f.run or not kind:
        raise UserError(
            "give a run directory and a request, such as --run=runs/finetune_dolly "
            f"stop; the requests are {', '.join(KINDS)}"
        )
    from research.runs.run_directory import RunDir

    folder = RunDir(f.run)
    folder.config()  # Raises where this is no run directory.
    if not folder.is_training():
        raise UserError(
            f"no job trains in {folder.path}, so nobody would answer; start it with "
            "python -m research.train"
        )
    name = write_request(folder.path, kind)
    limit = time.monotonic() + f.wait
    while (answer := answer_to(folder.history, name)) is None:
        if time.monotonic() > limit or not folder.is_training():
            return _give_up(folder, kind, name, withdraw(folder.path, name))
        time.sleep(LOOK_EVERY)
    sys.stdout.write(f"{kind}: {answer['answer']}, after step {answer['step']}\n")
    return 0 if answer["step"] is not None else 1


def _give_up(folder: "RunDir", kind: str, name: str, withdrawn: bool) -> int:
    """Says why there is no answer; returns the exit code."""
    if not folder.is_training() and (answer := answer_to(folder.history, name)):
        sys.stdout.write(f"{kind}: {answer['answer']}\n")
        return 0 if answer["step"] is not None else 1
    cause = "is busy" if folder.is_training() else "has ended"
    kept = "withdrawn" if withdrawn else "about to be answered: see run.json"
    sys.stderr.write(
        f"no answer: the job in {folder.path} {cause} (a job answers between two "
        f"steps, so not while it compiles or evaluates); the request is {kept}\n"
    )
    return 1


if __name__ == "__main__":
    command_line.run(main)
