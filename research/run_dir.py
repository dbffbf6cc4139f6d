"""The folder of one run: what lies where, whose it is, whether it is done."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from research.checkpoint import check_identity
from research.config import Config, fixed_differences, from_json, to_json
from research.errors import UserError


class RunDir:
    """Paths and marks of `config.run_dir`. Nothing is created before `create`."""

    def __init__(self, path: str | Path):
        if not str(path):
            raise UserError("config.run_dir is empty; name a folder for this run")
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self._config = self.path / "config.json"
        self._identity = self.path / "identity.json"
        self._complete = self.path / "complete.json"

    @property
    def exists(self) -> bool:
        return self._config.is_file()

    @property
    def is_complete(self) -> bool:
        """The run reached its last step and wrote its report."""
        return self._complete.is_file()

    def config(self) -> Config:
        """What the run was started with.

        Raises:
          UserError: this is no run directory, or not one of this version.
        """
        if not self.exists:
            raise UserError(
                f"{self.path} is not a run directory: it has no config.json"
            )
        try:
            return from_json(self._config.read_text(encoding="utf-8"))
        except ValueError as error:  # Of JSON, of UTF-8, or our own of a field.
            raise UserError(
                f"{self._config} is not a config of this version: {error}; choose "
                "another run directory"
            ) from error

    def check_config(self, config: Config) -> None:
        """Refuses a folder that holds a run of another config, or anything else."""
        if self.exists:
            differences = fixed_differences(self.config(), config)
            if differences:
                raise UserError(
                    f"{self.path} holds a run with another config:\n  "
                    + "\n  ".join(differences)
                    + "\nchoose another --config.run_dir, or remove the folder"
                )
        elif self.path.exists() and (
            not self.path.is_dir() or any(self.path.iterdir())
        ):
            raise UserError(
                f"{self.path} exists and is not a run directory; choose another "
                "--config.run_dir"
            )

    def check_identity(self, identity: dict[str, str]) -> None:
        """Refuses to go on with another base model, tokenizer or data set."""
        if self._identity.is_file():
            check_identity(self.identity(), identity, f"the run in {self.path}")

    def identity(self) -> dict[str, str]:
        return json.loads(self._identity.read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def create(
        self, config: Config, identity: dict[str, str], left_out: Sequence[str]
    ) -> Iterator[None]:
        """Makes the folder and writes down whose it is.

        The body may write more; only after it is this a run directory. `left_out`
        says `file:line: why` of every row that is not trained whole.

        Raises:
          UserError: the disk says no.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._identity.write_text(json.dumps(identity, indent=2), encoding="utf-8")
            (self.path / "left_out.txt").write_text(
                "".join(f"{line}\n" for line in left_out), encoding="utf-8"
            )
            yield
            # The config last: it is the mark of a run directory.
            self._config.write_text(to_json(config), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"run directory {self.path} cannot be written: {error}; choose another "
                "--config.run_dir"
            ) from error

    def mark_complete(self, facts: dict[str, object]) -> None:
        self._complete.write_text(json.dumps(facts, indent=2), encoding="utf-8")
