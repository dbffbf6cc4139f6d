"""A job to launch, and the plan of a launch: files and commands, not yet used."""

import dataclasses
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.config import command_line
from research.config.run_config import Config
from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class LaunchJob:
    """One trainer command: it trains a run, or several runs as one program.

    Attributes:
      name: any text that is unique in the launch.
      flags: the trainer's flags, as the user wrote them.
      config: the config that the flags make; for several runs, the largest of theirs.
      module: the trainer.
      beside: path to which a suffix is added to name the files of the job.
      env: variables to set before the trainer starts; see `compiler_settings`.
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
        """A job that trains one run; by default its folder's name is the job's name."""
        folder = Path(config.run_dir)
        return cls(name or folder.name, tuple(flags), config, beside=folder)

    def command(self, python: str, *, distributed: bool = False) -> list[str]:
        """The trainer's argv, which is the same for each of several processes.

        Raises:
          UserError: runs that train together cannot have several processes.
        """
        if distributed and self.module == "research.train.together":
            raise UserError(
                f"{self.name} train as one program, which has one process: set "
                "--together=1, or use one process"
            )
        joins = ["--config.runtime.distributed=true"] if distributed else []
        flags = command_line.last_of_each([*self.flags, *joins])
        return [python, "-m", self.module, *flags]

    def setting_env(self, command: Sequence[str]) -> list[str]:
        """The argv that sets the job's variables and runs `command` without a shell."""
        if not self.env:
            return list(command)
        return ["env", *(f"{k}={v}" for k, v in self.env.items()), *command]

    def file(self, suffix: str) -> Path:
        """A path beside the run's folder; only the trainer makes the folder itself."""
        return self.beside.with_name(self.beside.name + suffix)

    def label(self, longest: int = 40) -> str:
        """The name as clouds allow it, `[a-z]([-a-z0-9]*[a-z0-9])?` (RFC 1035)."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return (plain if plain[:1].isalpha() else f"run-{plain}")[:longest].strip("-")


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """Everything that a launch does.

    Attributes:
      files: texts by path, written before the commands run.
      commands: run in this order without a shell, so that nothing is interpreted.
      env: variables of each command, in addition to the launcher's own.
      notes: lines to show about options that are allowed and seldom meant.
    """

    files: Mapping[Path, str]
    commands: Sequence[Sequence[str]]
    env: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The text that `--dry-run` prints; its commands can be pasted into a shell."""
        parts = [f"# file {path}\n{text}" for path, text in self.files.items()]
        for index, command in enumerate(self.commands):
            env = self.env[index] if self.env else {}
            words = [*(f"{k}={shlex.quote(v)}" for k, v in env.items())]
            parts.append(" ".join([*words, shlex.join(command)]) + "\n")
        return "\n".join(parts)

    def require_tools(self, how: Mapping[str, str]) -> None:
        """Checks that all tools are on PATH; `how` says how to install each.

        Raises:
          UserError: one is missing.
        """
        for tool, remedy in how.items():
            if shutil.which(tool) is None:
                raise UserError(f"{tool} is not on PATH: {remedy}")

    def submit(self) -> int:
        """Writes the files and runs every command, even if one of them fails.

        Returns:
          The first exit code above 0.
        """
        self.write_files()
        codes = [subprocess.run(x, check=False).returncode for x in self.commands]
        return next((code for code in codes if code), 0)

    def write_files(self) -> None:
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def check_training_flags(arguments: Sequence[str]) -> Config:
    """Parses the trainer's flags as the trainer will, before anything is rented.

    Raises:
      UserError: the trainer would reject a flag or the config.
    """
    argv = ["research.train", *arguments]
    return command_line.parse_with_config(argv, "", command_line.NoFlags)[0]
