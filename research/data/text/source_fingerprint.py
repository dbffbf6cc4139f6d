"""The fingerprint of a source: a key that changes when any byte of it changes."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.config.data_knobs import TextConfig
from research.core.atomic_files import write_whole
from research.core.cache_folders import sweep, user_cache
from research.core.errors import UserError
from research.core.local_paths import local_path
from research.data.text.document_readers import TextSource

MEMO = "hashes.json"
# A file that changed this recently may change again within the clock's resolution.
FRESH_NS = 2 * 10**9


def cache_folder(config: TextConfig) -> Path:
    """The folder of tokenised sources, which may not exist yet.

    Raises:
      UserError: there is no home folder to put it in.
    """
    try:
        if config.cache_dir == "auto":
            return user_cache()
        return local_path(config.cache_dir)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no folder for tokenised data ({error}): name one with "
            "--config.text.cache_dir="
        ) from error


def sweep_old(config: TextConfig) -> None:
    """Removes old entries of the user's cache; a folder that was named is kept whole.

    Call it once the entries of this run are in use.
    """
    if config.cache_dir == "auto":
        for group in ("rows", "tokens"):
            sweep(cache_folder(config) / group)


def cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache folder {folder} cannot be written ({error}); make space or choose "
        "another with --config.text.cache_dir="
    )


def source_key(source: TextSource, cache: Path, settings: Mapping[str, Any]) -> str:
    """sha256 over the settings and over the name and the bytes of every file.

    A file is not read again while its `_stamp` stays the same.
    """
    parts = {
        **settings,
        "column": source.column,
        "undecodable": source.undecodable,
        "bad_lines": source.bad_lines,
        "inputs": [[str(source.hub_address), source.revision]]
        if source.revision
        else file_hashes([(f.name, f.path) for f in source.files], cache, source.name),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_hashes(
    files: Sequence[tuple[str, Path]], cache: Path, source: str
) -> list[list[str]]:
    """The name and the sha256 of each file; a file of known stamp is not read again.

    Raises:
      UserError: a file cannot be read.
    """
    known = _read_memo(cache)
    fresh: dict[str, list[Any]] = {}
    hashes, said = [], time.monotonic()
    for number, (name, place) in enumerate(files, start=1):
        path = os.path.abspath(place)
        try:
            stamp = _stamp(path)
            if known.get(path, [])[:-1] != stamp:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                fresh[path] = known[path] = [*stamp, digest]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        hashes.append([name, known[path][-1]])
        if time.monotonic() - said > 5:
            said = time.monotonic()
            logging.info("data: %s, hashed %d of %d files", source, number, len(files))
    now = time.time_ns()
    settled = {
        p: entry for p, entry in fresh.items() if now - max(entry[1:3]) > FRESH_NS
    }
    if settled:
        _add_to_memo(cache, settled)
    return hashes


def _stamp(path: str) -> list[int]:
    """Size, modification time, status-change time and inode of a file.

    An edit that keeps the size and sets the modification time back still changes the
    status-change time, and a file that replaces another has its own inode.
    """
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_memo(cache: Path) -> dict[str, list[Any]]:
    try:
        memo = json.loads((cache / MEMO).read_text(encoding="utf-8"))
        return {
            path: [*map(int, stamp), str(digest)]
            for path, (*stamp, digest) in memo.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # The memo only saves time.


def _add_to_memo(cache: Path, entries: Mapping[str, list[Any]]) -> None:
    """Adds entries. If two write at once, one loses its own and hashes again."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        memo = {**_read_memo(cache), **entries}
        write_whole(cache / MEMO, json.dumps(memo))
    except OSError:
        return  # The memo only saves time, and a finished cache may be read-only.
