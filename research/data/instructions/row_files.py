"""The files of rows that a path stands for: a file, a folder, a pattern, or several."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from research.core.errors import UserError
from research.core.hub_access import how_on_hub
from research.core.local_paths import holds_run, listed_paths, local_path, no_such
from research.data.compressed_files import kind_of
from research.data.row_readers import READERS, BadRowError, Row, read_rows


def read_files(written: str) -> Iterator[tuple[str, Row | BadRowError]]:
    """Yields `(where, row)` of the files of a path, in order of their names.

    `where` begins with the file's name, below the folder that all files share.

    Args:
      written: `config.data.path` or `config.data.eval_path`.

    Raises:
      UserError: there is no such file, or one is unreadable or of an unknown kind.
    """
    files = row_files(written)
    shared = Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        folder = file.parent.relative_to(shared).as_posix()
        yield from read_rows(file, "" if folder == "." else f"{folder}/")


def row_files(written: str, knob: str = "config.data.path") -> list[Path]:
    """The files of a path, or of paths between commas; `knob` is what names them.

    Raises:
      UserError: a path leads to no file.
    """
    places = [local_path(part, knob, "dataset") for part in listed_paths(written)]
    files = (file for place in places for file in _files_of(place, knob))
    return list(dict.fromkeys(files))


def _files_of(path: Path, knob: str) -> list[Path]:
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.is_file() and kind_of(p) in READERS)
        files = [p for p in inside if _is_wanted(p.relative_to(path), path)]
        what = f"no file in folder {path} ends in {', '.join(READERS)}"
    elif not path.exists() and glob.has_magic(str(path)):
        found = glob.glob(str(path), recursive=True)
        files = [Path(p) for p in found if Path(p).is_file()]
        what = f"no file matches {path}"
    elif not path.exists():
        is_file = kind_of(path) in READERS
        how = "check its path" if is_file else how_on_hub(str(path), "dataset")
        raise no_such(f"{knob}={path}", path, how)
    else:
        return [path]
    if not files:
        raise UserError(f"{what}; check {knob}")
    return sorted(files)


def _is_wanted(file: Path, folder: Path) -> bool:
    """Whether `file`, below `folder`, is neither hidden nor part of a run."""
    above = (folder / parent for parent in file.parents[:-1])
    is_hidden = any(part.startswith(".") for part in file.parts)
    return not is_hidden and not any(map(holds_run, above))
