"""The folder of one run: what lies where, whose it is, who writes it, what is done."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock

from research.checkpoints.run_identity import Identity, check_identity
from research.config.knobs import flat
from research.config.run_config import Config, fixed_differences, from_json, to_json
from research.core.errors import UserError, nearest

IDENTITY_PARTS = ("base model", "tokenizer", "data")


class RunDir:
    """Paths and marks of `config.run_dir`. Nothing is created before `create`."""

    def __init__(self, path: str | Path):
        if not str(path):
            raise UserError("config.run_dir is empty; name a folder for this run")
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.history = self.path / "run.json"
        self._config = self.path / "config.json"
        self._identity = self.path / "identity.json"
        self._complete = self.path / "complete.json"
        self._left_out = self.path / "left_out.txt"
        self._holder = self.path / "lock.holder"
        # The system frees it with the process, however that ends, on a dead host, too.
        self._lock = filelock.FileLock(self.path / "lock", fallback_to_soft=False)

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

    def check_config(self, config: Config) -> dict[str, str]:
        """Refuses a folder that holds a run of another config, or anything else.

        Returns:
          `old -> new` by knob, of those that differ and are in `config.accept`.
        """
        known = (*IDENTITY_PARTS, *flat(config))
        for name in config.accept:
            if name not in known:
                raise UserError(
                    f"config.accept names {name!r}{nearest(name, known)}; it takes "
                    f"{', '.join(IDENTITY_PARTS)} and knobs such as 'data.seq_len'"
                )
        if ".." in self.path.parts:
            raise UserError(
                f"config.run_dir is {self.path}; a path with '..' is refused: name the "
                "folder itself"
            )
        if self.exists:
            differences = fixed_differences(self.config(), config)
            refused = differences.keys() - set(config.accept)
            if refused:
                raise UserError(
                    f"{self.path} holds a run with another config:\n  "
                    + "\n  ".join(f"{k}: {differences[k]}" for k in sorted(refused))
                    + "\nchoose another --config.run_dir, remove the folder, or go on "
                    "with the difference by naming it in --config.accept"
                )
            return differences
        if self.path.exists() and (not self.path.is_dir() or self._has_strangers()):
            raise UserError(
                f"{self.path} exists and is not a run directory; choose another "
                "--config.run_dir"
            )
        return {}

    def _has_strangers(self) -> bool:
        """Whether anything lies here that no creation broken off half-way leaves."""
        ours = {self._config, self._identity, self._left_out, self.tokenizer}
        ours |= {self._holder, Path(self._lock.lock_file)}
        return any(
            path.with_name(path.name.removesuffix(".tmp")) not in ours
            for path in self.path.iterdir()
        )

    def check_identity(
        self, identity: Identity, accept: Sequence[str] = ()
    ) -> dict[str, str]:
        """Refuses to go on with another base model, tokenizer or data set.

        Returns:
          `old -> new` by part, of those that differ and were accepted.
        """
        if not self._identity.is_file():
            return {}
        what = f"the run in {self.path}"
        return check_identity(self.identity(), identity, what, accept)

    def lock(self) -> None:
        """Keeps other trainers out until this process ends.

        Raises:
          UserError: another one is at work here, or the folder cannot be written.
        """
        try:
            self._lock.acquire(timeout=0)
            _write(self._holder, f"{socket.gethostname()}, process {os.getpid()}")
        except filelock.Timeout:
            holder = "an unknown process"
            with contextlib.suppress(OSError):
                holder = self._holder.read_text(encoding="utf-8")
            raise UserError(
                f"{self.path} is being trained in by another process ({holder}): wait "
                "for it, stop it, or choose another --config.run_dir"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> UserError:
        return UserError(
            f"run directory {self.path} cannot be written: {error}; give back the "
            "right to write it, make room, or choose another --config.run_dir"
        )

    def identity(self) -> Identity:
        return json.loads(self._identity.read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def create(
        self, config: Config, identity: Identity, left_out: Sequence[str]
    ) -> Iterator[None]:
        """Makes the folder, locks it and writes down whose it is.

        The body may write more; only after it is this a run directory. `left_out`
        says `file:line: why` of every row that is not trained whole.

        Raises:
          UserError: the disk says no, or another process was faster.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if self.exists:  # Made since `check_config` looked.
                raise UserError(f"{self.path} holds a run since just now; try again")
            self.update(identity, left_out)
            yield
            # The config last: it is the mark of a run directory.
            _write(self._config, to_json(config))
        except OSError as error:
            raise self._unwritable(error) from error

    def update(
        self,
        identity: Identity,
        left_out: Sequence[str],
        config: Config | None = None,
    ) -> None:
        """Writes down whose the run is from now on; it may have steps to make again."""
        self._complete.unlink(missing_ok=True)
        _write(self._identity, json.dumps(identity, indent=2))
        _write(self._left_out, "".join(f"{line}\n" for line in left_out))
        if config is not None:
            _write(self._config, to_json(config))

    def mark_complete(self, facts: dict[str, object]) -> None:
        _write(self._complete, json.dumps(facts, indent=2))


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process is killed."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
