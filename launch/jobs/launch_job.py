"""What is launched, and what launching it takes: commands and files, not yet used."""

import dataclasses
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.config import command_line
from research.config.run_config import Config
from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class LaunchJob:
    """One command of a trainer: a run, or several that train as one program.

    Attributes:
      name: told apart by it from the others of a launch; may be any text.
      flags: of the trainer, as they were given.
      config: what they come to; of several runs, what they share.
      module: the trainer.
      beside: where files about the job go; a suffix is added to its name.
      env: variables that must be set before it starts; see `launch/settings.py`.
    """

    name: str
    flags: tuple[str, ...]
    config: Config
    module: str = "research.train"
    beside: Path = Path()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_run(
        cls, flags: Sequence[str], config: Config, name: str = ""
    ) -> "LaunchJob":
        """A job of one run, named by its folder."""
        folder = Path(config.run_dir)
        return cls(name or folder.name, tuple(flags), config, beside=folder)

    def command(self, python: str, *, distributed: bool = False) -> list[str]:
        """The trainer's argv; each of several processes runs the same.

        Raises:
          UserError: runs that train together have one process.
        """
        if distributed and self.module == "research.train_together":
            raise UserError(
                f"{self.name} train as one program, and only in one process: give "
                "--together=1, or one process"
            )
        own = [python, "-m", self.module, *self.flags]
        return [*own, "--config.runtime.distributed=true"] if distributed else own

    def setting_env(self, command: Sequence[str]) -> list[str]:
        """The argv that runs `command` with the job's variables, without a shell."""
        if not self.env:
            return list(command)
        return ["env", *(f"{k}={v}" for k, v in self.env.items()), *command]

    def file(self, suffix: str) -> Path:
        """Beside the run's folder, never in it: that one the trainer makes."""
        return self.beside.with_name(self.beside.name + suffix)

    def label(self, longest: int = 40) -> str:
        """The name as clouds allow them: `[a-z]([-a-z0-9]*[a-z0-9])?`, RFC 1035."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return (plain if plain[:1].isalpha() else f"run-{plain}")[:longest].strip("-")


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
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
    argv = ["research.train", *arguments]
    return command_line.parse_with_config(argv, "", command_line.NoFlags)[0]
