"""What is launched, and what launching it takes: commands and files, not yet used."""

import dataclasses
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from research import doors
from research.config import Config
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
      flags: of research.train, as they were given.
      config: what they come to.
    """

    flags: tuple[str, ...]
    config: Config

    def command(self, python: str) -> list[str]:
        """The trainer's argv; each of several processes runs the same."""
        return [python, "-m", "research.train", *self.flags]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a launch does.

    Attributes:
      files: their texts by path, written before the commands.
      commands: run in this order, without a shell: nothing in them is interpreted.
      env: set beside the launcher's own environment, for each command.
    """

    files: Mapping[Path, str]
    commands: Sequence[Sequence[str]]
    env: Sequence[Mapping[str, str]] = ()

    def text(self) -> str:
        """What `--dry-run` prints; the commands can be pasted into a shell."""
        parts = [f"# file {path}\n{text}" for path, text in self.files.items()]
        for index, command in enumerate(self.commands):
            env = self.env[index] if self.env else {}
            words = [*(f"{k}={shlex.quote(v)}" for k, v in env.items())]
            parts.append(" ".join([*words, shlex.join(command)]) + "\n")
        return "\n".join(parts)

    def require_tools(self, how: Mapping[str, str]) -> None:
        """`how` says of each tool what to install.

        Raises:
          UserError: one is not on PATH.
        """
        for tool, remedy in how.items():
            if shutil.which(tool) is None:
                raise UserError(f"{tool} is not on PATH: {remedy}")

    def write_files(self) -> None:
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def check_training_flags(arguments: Sequence[str]) -> Config:
    """The config that the trainer would read from these flags.

    Raises:
      UserError: what the trainer would say of them, before a machine is rented.
    """
    if "config" not in flags.FLAGS:
        doors.define_config()
    doors.parse(["research.train", *arguments], "", has_config=True)
    return doors.config_from_flags()
