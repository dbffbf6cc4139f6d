"""Where raw text comes from: sources by name, and the files of each."""

import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from research.config.run_config import Config, TextConfig
from research.core.errors import UserError
from research.core.hub_access import ask_hub
from research.data.text.document_readers import Input, Source, hub_parts
from research.data.text.mixture import mixture_weights

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
STDLIB_LARGEST = 300_000  # What is larger was generated.


def check_text(config: TextConfig) -> None:
    """Reads the names of sources and mixture, and nothing else.

    Raises:
      UserError: they do not fit.
    """
    mixture_weights(config, list(_places(config)))


def _places(config: TextConfig) -> dict[str, str]:
    """`{name: where}`."""
    if not config.sources:
        raise UserError("config.text.sources is empty; give name=where at least once")
    places: dict[str, str] = {}
    for written in config.sources:
        name, equals, where = written.partition("=")
        if not equals or not where or not NAME.fullmatch(name):
            raise UserError(
                f"config.text.sources has {written!r}; write name=where, where the "
                "name is made of letters, digits, '_', '.' and '-'"
            )
        if name in places:
            raise UserError(
                f"config.text.sources has two named {name!r}; rename one of them"
            )
        places[name] = where
    return places


def open_sources(config: Config) -> list[Source]:
    """The sources of `config.text`, listed and not yet read.

    Raises:
      UserError: a source is not `name=where`, or is not there.
    """
    sources, text = [], config.text
    for name, where in _places(text).items():
        inputs, revision = _locate(name, where, config.data.hub_timeout)
        sources.append(
            Source(
                name, where, inputs, revision, text.column, text.undecodable,
                config.data.bad_lines,
            )
        )  # fmt: skip
    return sources


def _locate(name: str, where: str, timeout: float) -> tuple[tuple[Input, ...], str]:
    if where == "stdlib":
        return tuple(_stdlib()), ""
    if where.startswith("hub://"):
        owner_name = hub_parts(where)[0]
        answer = ask_hub(owner_name, "dataset", timeout)
        if not answer.revision:
            raise UserError(
                f"text source {name}={where} is out of reach ({answer.reason}); give a "
                "local file or folder, or more time with --config.data.hub_timeout="
            )
        return (Input(owner_name, Path(where), 0),), answer.revision
    path = Path(where).expanduser()
    if path.is_file():
        return (Input(path.name, path, path.stat().st_size),), ""
    if not path.is_dir():
        raise UserError(
            f"text source {name}={where} does not exist; give stdlib, a file, a folder "
            "or hub://owner/name"
        )
    inputs = tuple(_files_under(path, lambda name: not name.startswith(".")))
    if not inputs:
        raise UserError(
            f"text source {name}={where} has no files; hidden ones do not count"
        )
    return inputs, ""


def _files_under(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Input]:
    """Files whose every relative part is wanted, in the order of their names."""
    found = []

    def refuse(error: OSError) -> None:
        raise UserError(f"text folder {folder} cannot be read: {error}") from error

    for at, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if wanted(name)]
        found += [Path(at, name) for name in names if wanted(name)]
    for path in sorted(found, key=lambda path: path.relative_to(folder).parts):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            yield Input(name, path, path.stat().st_size)


def _stdlib() -> Iterator[Input]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for item in _files_under(folder, lambda name: name not in STDLIB_SKIPPED):
        generated = item.path.name.startswith("_sysconfigdata")
        if item.path.suffix == ".py" and not generated and item.size < STDLIB_LARGEST:
            yield item
