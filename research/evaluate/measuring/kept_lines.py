"""The findings of an evaluation so far, line by line, so that a kill costs little.

The name of a file is a digest of all that its lines depend on. So the same command
finds its own lines again, and another command never takes them for its own.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from research.core.atomic_files import make_folder
from research.core.errors import SaveError, UserError, files_of_step

KEPT = "kept"  # The folder of such files below `evaluations/`.
Key = tuple[str, str]  # Model and row.


def digest(*parts: Any) -> str:
    """24 hexadecimal digits for the `repr` of some values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


class KeptLines:
    """A file of JSON objects, one for each row of each model."""

    def __init__(self, file: IO[bytes], path: Path):
        """Reads the lines that are there; one that a kill has torn is cut off.

        Raises:
          UserError: a line holds something else.
        """
        self._file, self._path = file, path
        self.found: dict[Key, dict[str, Any]] = {}
        file.seek(0)
        end = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                values = json.loads(line)
                key = values.pop("model"), values.pop("row")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}:{number} is no line of an evaluation ({error!r}); remove "
                    "the file, and the same command makes it again"
                ) from error
            self.found[key] = values
            end += len(line)
        file.truncate(end)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, kind: str, name: str) -> Iterator["KeptLines"]:
        """The lines of `kind` and `name`, for this process alone.

        Raises:
          UserError: another process writes them, or the folder cannot be written.
          SaveError: a line could not be written; the lines before it are kept.
        """
        path = folder / KEPT / f"{kind}-{name}.jsonl"
        with files_of_step(None, f"the evaluation in {folder}"):
            make_folder(path.parent)
            file = open(path, "a+b")  # noqa: SIM115
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{path} is being written by another evaluation: wait for it"
                ) from error
            yield cls(file, path)

    def add(self, key: Key, values: Mapping[str, Any]) -> None:
        """Writes a line. Raises SaveError: the disk refuses."""
        model, row = key
        text = json.dumps({"model": model, "row": row, **values})
        try:
            self._file.write(text.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise SaveError(
                f"{self._path} could not be written ({error.strerror}); its lines are "
                "kept, and the same command continues",
                step=None,
            ) from error
        self.found[key] = dict(values)
