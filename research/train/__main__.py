"""Trains a model: `python -m research.train --config=configs/finetune_dolly.py`.

The door alone; what a run is made of stands in `training.py`.
"""

from collections.abc import Sequence

from research.config import command_line

USAGE = """
python -m research.train --config=FILE.py [--config.KNOB=VALUE ...]

Trains what the config says, with progress, and leaves checkpoints, metrics, a plot
and a report in its run_dir. Called again, it resumes, or says that it is done.
"""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 75 stopped by a signal and resumable."""
    command_line.resume_after_sigterm()
    command_line.define_config()
    command_line.parse(argv, USAGE, has_config=True)
    config = command_line.config_from_flags()
    # Only now: importing JAX takes longer than saying what is wrong with a flag.
    from research.train.pipeline import train

    return train([config])


if __name__ == "__main__":
    command_line.run(main)
