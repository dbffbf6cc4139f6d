"""The folder of one run: its files, its identity, its lock, and its completion mark."""

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock

from research.checkpoints.run_identity import (
    Identity,
    accepting,
    check_identity,
    refuse_impossible,
)
from research.config.field_names import explain
from research.config.knobs import flat
from research.config.run_config import Config
from research.config.saved_config import (
    as_begun,
    differences,
    from_json,
    model_and_no_run,
    near_run,
    to_json,
)
from research.core.atomic_files import (
    intended_name,
    make_folder,
    remove_leftovers,
    write_whole,
)
from research.core.errors import UserError
from research.core.json_files import read_json, require_file
from research.core.local_paths import local_path
from research.runs import run_history
from research.runs.lineage.hub_pins import Pins, is_pin, pinned

IDENTITY_PARTS = ("base model", "tokenizer", "data")
RUN = "run"  # The part of an identity that tells runs apart; older runs lack it.
COMPLETE = "complete.json"
# A start refuses anything else that has one of these names, before it loads anything.
FILES = (
    *("config.json", "identity.json", "hub_revisions.json", "run.json", COMPLETE),
    *("doctor.json", "preview.json", "answers.json", "samples.jsonl", "metrics.jsonl"),
    *("left_out.txt", "report.md", "report.html", "loss.png", "lock", "lock.holder"),
    "proof_rows.json",
)


def is_complete(folder: Path) -> bool:
    """Whether the run in `folder` has reached its last step and written its report.

    Raises:
      UserError: the mark of completion holds something else.
    """
    mark = folder / COMPLETE
    if not os.path.lexists(mark):
        return False
    read_json(mark, dict, "remove it: the same command then makes the report again")
    return True


class RunDir:
    """Paths and marks of `config.run_dir`. Nothing is created before `create`."""

    def __init__(self, path: str | Path):
        """`path` may begin with `~`.

        Raises:
          UserError: `path` is empty, or no path of this machine.
        """
        if not str(path):
            raise UserError("config.run_dir is empty; name a folder for this run")
        self.path = local_path(path, "config.run_dir")
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.history = self.path / "run.json"
        self._config = self.path / "config.json"
        self._identity = self.path / "identity.json"
        self._complete = self.path / COMPLETE
        self._left_out = self.path / "left_out.txt"
        self._holder = self.path / "lock.holder"
        self._pins = self.path / "hub_revisions.json"
        self.pins: Pins = {}
        # The system releases the lock when the process ends, however it ends, and
        # when its host dies.
        self._lock = filelock.FileLock(self.path / "lock", fallback_to_soft=False)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether the folder is a run directory, which its `config.json` marks."""
        return os.path.isfile(self._config)  # Not there, or a name that cannot be.

    def require_present(self) -> None:
        """Raises FileNotFoundError if the folder was moved or removed."""
        if not self.exists:
            raise FileNotFoundError(f"{self.path} was moved or removed")

    @property
    def own_tokenizer(self) -> Path | None:
        """The folder of the tokenizer that the run was made with; None if it is new.

        A creation that was interrupted may have written only a part of it.
        """
        return self.tokenizer if self.exists else None

    @property
    def holder(self) -> str:
        """The process that locked the folder last; empty if it was never locked."""
        try:
            return self._holder.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    @property
    def is_complete(self) -> bool:
        """Whether the run has reached its last step and written its report."""
        return is_complete(self.path)

    def config(self) -> Config:
        """The config that the run was started with; its paths lead there from anywhere.

        Raises:
          UserError: this is not a run directory, or its config cannot be read.
        """
        with self._reading_config() as text:
            return pinned(from_json(text, self.path), self.known_pins())

    @contextlib.contextmanager
    def _reading_config(self) -> Iterator[str]:
        """Gives the text of the config; an error in it names the file."""
        if not self.exists:
            raise UserError(
                f"{self.path} is not a run directory: it has no config.json"
                f"{near_run(self.path)}"
            )
        if said := model_and_no_run(str(self.path)):
            raise UserError(f"{self.path} {said}; or choose another run directory")
        try:
            yield self._config.read_text(encoding="utf-8")
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(
                f"{self._config} is not a config of this version: {error}; restore a "
                "copy, or choose another run directory"
            ) from error

    def check_config(self, config: Config) -> dict[str, str]:
        """Refuses a folder that holds a run of another config, or anything else.

        Returns:
          `old -> new` by knob, for knobs that differ and are in `config.accept`.

        Raises:
          UserError: a knob differs and is not accepted, `config.accept` names an
            unknown knob, or the folder cannot become a run directory.
        """
        known = (*IDENTITY_PARTS, *flat(config))
        for name in config.accept:
            if name not in known:
                raise UserError(
                    f"config.accept: {name!r}{explain(name, known)}; it takes "
                    f"{', '.join(IDENTITY_PARTS)} and knobs such as 'data.seq_len'"
                )
        if ".." in self.path.parts:
            raise UserError(
                f"config.run_dir is {self.path}; a path with '..' is refused: name the "
                "folder itself"
            )
        for name in FILES:
            require_file(self.path / name)
        if self.exists:
            pins = self.known_pins()
            with self._reading_config() as text:
                old = from_json(text)
                # Older runs kept their hub addresses as they were written.
                changes = differences(
                    text,
                    config,
                    self.path,
                    lambda config: as_begun(pinned(config, pins), old),
                )
            history = run_history.read(self.history)
            refuse_impossible(self.path, flat(old), flat(config), changes, history)
            refused = changes.keys() - set(config.accept)
            if refused:
                raise UserError(
                    f"{self.path} holds a run with another config:\n  "
                    + "\n  ".join(f"{k}: {changes[k]}" for k in sorted(refused))
                    + "\nchoose another --config.run_dir, remove the folder, or accept "
                    f"the difference: add {accepting(refused, config.accept)}"
                )
            return changes
        try:
            self._require_makeable()
        except OSError as error:
            raise self._unwritable(error) from error
        return {}

    def _require_makeable(self) -> None:
        """Refuses a path at which no run directory can be made.

        Raises:
          UserError: something else is there, or its name is none that all libraries
            can write to.
          OSError: the disk will refuse to make it.
        """
        # Bytes that are no text stand in it as halves of characters.
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.path)):
            raise UserError(
                f"config.run_dir is {str(self.path)!a}, which is no UTF-8 in this "
                "locale; choose another name, or set LC_ALL=C.UTF-8"
            )
        place = self.path.absolute()
        while not os.path.lexists(place):
            with contextlib.suppress(FileNotFoundError):
                place.lstat()  # Raises, for example, for a name that is too long.
            place = place.parent
        if not place.is_dir() and place.is_symlink():
            raise FileNotFoundError(f"{place} is a link that leads nowhere")
        if not place.is_dir() and place != self.path.absolute():
            raise NotADirectoryError(f"{place} is not a folder")
        if place == self.path.absolute() and (
            not place.is_dir() or self._has_strangers()
        ):
            raise UserError(
                f"{self.path} exists and is not a run directory; choose another "
                "--config.run_dir"
            )
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"{place} must not be written to")

    def known_pins(self) -> Pins:
        """The commits that the run has kept so far.

        Raises:
          UserError: the file that keeps them holds something else.
        """
        remedy = "restore a copy of it, or remove it to use the newest commits"
        pins = read_json(self._pins, {...: str}, remedy, absent={})
        for written, pin in pins.items():
            if not is_pin(pin):
                raise UserError(
                    f"{self._pins} cannot be used ({written!r} is {repr(pin)[:80]}, "
                    f"not a hub address at a commit); {remedy}"
                )
        return pins

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run, and no other model with a `config.json`."""
        return self.exists and self._identity.is_file()

    def keep_pins(self) -> None:
        """Writes the commits that `pin` has found. Raises UserError: it cannot."""
        if self.pins != self.known_pins():
            try:
                write_whole(self._pins, json.dumps(self.pins, indent=2))
            except OSError as error:
                raise self._unwritable(error) from error

    def _has_strangers(self) -> bool:
        """Whether the folder holds files that an interrupted creation cannot leave."""
        ours = {self._config, self._identity, self._left_out, self.tokenizer}
        ours |= {self._holder, self._pins, Path(self._lock.lock_file)}
        names = {path.name for path in ours}
        return any(intended_name(path) not in names for path in self.path.iterdir())

    def check_identity(
        self, identity: Identity, accept: Sequence[str] = ()
    ) -> dict[str, str]:
        """Refuses another base model, tokenizer or dataset than the run has.

        Returns:
          `old -> new` by part, for parts that differ and are accepted.
        """
        if not self.exists:
            return {}
        what = f"the run in {self.path}"
        return check_identity(self.identity(), identity, what, accept)

    def lock(self) -> None:
        """Keeps other trainers out until this process ends.

        Raises:
          UserError: another process trains here, or the folder cannot be written.
        """
        try:
            self._lock.acquire(timeout=0)
            remove_leftovers(self.path)
            write_whole(self._holder, f"{socket.gethostname()}, process {os.getpid()}")
        except filelock.Timeout:
            holder = self.holder or "an unknown process"
            raise UserError(
                f"{self.path} is being trained in by another process ({holder}): wait "
                "for it, stop it, or choose another --config.run_dir"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise self._unwritable(error) from error

    def is_training(self) -> bool:
        """Whether a trainer holds the lock of this folder now."""
        if not Path(self._lock.lock_file).is_file():
            return False
        with open(self._lock.lock_file) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _unwritable(self, error: Exception) -> UserError:
        return UserError(
            f"run directory {self.path} cannot be written: {error}; give back the "
            "right to write it, make room, or choose another --config.run_dir"
        )

    def identity(self) -> Identity:
        """The fingerprints that the run began with. Raises UserError without them."""
        return read_json(
            self._identity,
            dict.fromkeys((*IDENTITY_PARTS, ...), str),
            "restore a copy: meta/metadata in each checkpoint holds the same as "
            "`identity`",
        )

    def origin(self) -> Identity:
        """The part of the identity that no other run has; empty in older runs.

        A run that another process makes right now may have none yet.
        """
        identity = self.identity() if self.exists else {}
        return {RUN: identity[RUN]} if RUN in identity else {}

    @contextlib.contextmanager
    def create(
        self, config: Config, identity: Identity, left_out: Sequence[str]
    ) -> Iterator[None]:
        """Makes and locks the folder and writes its identity.

        The body of the `with` may write more files. The folder becomes a run directory
        only after the body has ended.

        Args:
          config: what the run is started with.
          identity: fingerprints of base model, tokenizer and dataset.
          left_out: `file:line: why` for every row that is dropped or shortened.

        Raises:
          UserError: the disk refuses, or another process was faster.
        """
        try:
            make_folder(self.path)
            self.lock()
            if self.exists:  # Made since `check_config` looked.
                raise UserError(f"{self.path} holds a run since just now; try again")
            self.update(identity | {RUN: uuid.uuid4().hex}, left_out)
            self.keep_pins()
            yield
            # The config comes last: it marks the folder as a run directory.
            write_whole(self._config, to_json(config))
        except OSError as error:
            raise self._unwritable(error) from error

    def update(
        self,
        identity: Identity,
        left_out: Sequence[str],
        config: Config | None = None,
    ) -> None:
        """Replaces identity, dropped rows and config; the run is then incomplete."""
        self._complete.unlink(missing_ok=True)
        write_whole(self._identity, json.dumps(self.origin() | identity, indent=2))
        write_whole(self._left_out, "".join(f"{line}\n" for line in left_out))
        if config is not None:
            write_whole(self._config, to_json(config))

    def mark_complete(self, facts: dict[str, object]) -> None:
        """Writes `complete.json`: the run is done, and `facts` sum it up."""
        write_whole(self._complete, json.dumps(facts, indent=2))
