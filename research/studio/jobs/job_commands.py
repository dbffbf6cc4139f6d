"""The commands behind the buttons. A page shows each before it runs, with its flags."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from research.config import command_line
from research.config.cross_knob_rules import idle
from research.config.field_names import flag
from research.config.knobs import flat
from research.config.run_config import Config
from research.runs.run_directory import RunDir
from research.studio.confinement import Confinement
from research.studio.roots import shown_paths


def python() -> str:
    """The interpreter as people write it: `.venv/bin/python` where it is below here.

    It is not resolved: the link in an environment leads to the bare interpreter.
    """
    return shown_paths([Path(sys.executable)])[0]


def as_text(words: Sequence[str]) -> str:
    """A command that can be pasted into a shell."""
    return shlex.join(words)


def sweeping(flags: Sequence[str]) -> list[str]:
    """Trains a sweep on this machine; see `docs/sweeps.md`."""
    return [python(), "-m", "launch.sweep", *flags]


def reporting(folder: Path) -> list[str]:
    """Reports what is done of a sweep."""
    return [python(), "-m", "launch.report", f"--sweep={shown_paths([folder])[0]}"]


def evaluating(flags: Sequence[str]) -> list[str]:
    """Evaluates runs; see `research.evaluate`."""
    return [python(), "-m", "research.evaluate", *flags]


def launching(flags: Sequence[str]) -> list[str]:
    """Trains on this machine, with restarts after failures."""
    return [python(), "-m", "launch", "local", "--", *flags]


def checking(
    flags: Sequence[str], into: Path, *, rows_only: bool, first: int = 0
) -> list[str]:
    """Looks at a start and trains nothing; see `research.studio.checks`."""
    kind = ["--rows_only"] if rows_only else []
    kind += [f"--first={first}"] if first else []
    place = f"--into={shown_paths([into])[0]}"
    return [python(), "-m", "research.studio.checks", place, *kind, *flags]


def planning(flags: Sequence[str], devices: Sequence[str], file: Path) -> list[str]:
    """Plans a training on several kinds of chips; see `research.plan`."""
    into = f"--json={shown_paths([file])[0]}"
    door = [python(), "-m", "research.plan", f"--device={','.join(devices)}", into]
    return [*door, *flags]


def launching_on(target: str, own: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Trains elsewhere; `own` are the flags of the target, see `docs/launch.md`."""
    return [python(), "-m", "launch", target, *own, "--", *flags]


def requesting(folder: Path, kind: str) -> list[str]:
    """Sends a request to the job that trains in `folder`."""
    return [python(), "-m", "research.runs", f"--run={shown_paths([folder])[0]}", kind]


def serving(flags: Sequence[str], port: int, keys: Path) -> list[str]:
    """Serves models on a port of this machine, to whoever has a key of a file."""
    place = [f"--port={port}", f"--api_key_file={shown_paths([keys])[0]}"]
    return [python(), "-m", "research.serve", *flags, *place]


def removing(folder: Path) -> list[str]:
    """Removes a folder of the studio's own files."""
    return ["rm", "-r", shown_paths([folder])[0]]


def resuming(folder: Path) -> list[str]:
    """The trainer's flags that resume a run."""
    return [f"--config={shown_paths([folder])[0]}"]


def branching(
    folder: Path, step: int, target: Path, changes: Sequence[str] = ()
) -> list[str]:
    """The trainer's flags of a new run that begins at a checkpoint of another.

    Knobs that made the old run's random weights or its tokenizer have no effect in the
    new one, and are set back.

    Args:
      folder: of the run that has the checkpoint.
      step: of the checkpoint.
      target: the new run directory.
      changes: more flags, such as `--config.optim.learning_rate=1e-4`.

    Raises:
      UserError: `folder` is no run.
    """
    old, new = shown_paths([folder, target])
    begun = f"{old}@{step}"
    config, default = RunDir(folder).config(), flat(Config())
    based = dataclasses.replace(config.model, init_from=begun)
    later = dataclasses.replace(config, model=based)
    given = {word.partition("=")[0] for word in changes}
    # An adapter that the old run continues is part of the new one's base.
    back = [
        flag(path, default[path])
        for path in (*idle(later), "lora.init_from")
        if flat(later)[path] != default[path] and f"--config.{path}" not in given
    ]
    return [
        f"--config={old}",
        f"--config.run_dir={new}",
        f"--config.model.init_from={begun}",
        *back,
        *changes,
    ]


def config_of(flags: Sequence[str], confined: Confinement) -> tuple[Config, Path]:
    """The config that the trainer's flags make, and the run directory.

    Raises:
      UserError: the trainer would refuse a flag.
      UserError, PageError: see `Confinement.check_config`.
    """
    argv = ["research.train", *flags]
    config, _ = command_line.parse_with_config(argv, "", command_line.NoFlags)
    return config, confined.check_config(config)
