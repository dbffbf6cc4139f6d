"""Trains a model: `python -m research.train --config=configs/finetune_dolly.py`."""

from collections.abc import Sequence

from research.config import command_line
from research.core import stop_signals

USAGE = """
python -m research.train --config=FILE.py [--config.KNOB=VALUE ...]

Trains what the config says, shows progress, and writes checkpoints, metrics, a plot
and a report into its run_dir. The same command resumes a run that has stopped, and so
does --config=RUN_DIR, wherever that folder has moved.
"""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 7 or 75 stopped; see `docs/recovery.md`."""
    stop_signals.resume_after_signals()
    config, _ = command_line.parse_with_config(argv, USAGE, command_line.NoFlags)
    # Imported late: importing JAX takes longer than saying what is wrong with a flag.
    from research.train.start_to_report import train

    return train([config])


if __name__ == "__main__":
    command_line.run(main, prints_results=False)
