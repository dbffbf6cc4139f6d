"""The sources of raw text: their names, the files of each, and their shares."""

import logging
import math
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from research.config.data_knobs import BY_SIZE, DataConfig, TextConfig
from research.config.field_names import SOURCE_NAME, shell_flag, written_list
from research.core.errors import UserError, nearest
from research.core.hub_access import HubAddress, how_on_hub, is_hub, require_commit
from research.core.local_paths import holds_run, local_path, no_such
from research.data.text.document_readers import SourceFile, TextSource

STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
STDLIB_LARGEST = 300_000  # Larger files were generated.


def check_text(config: TextConfig) -> None:
    """Checks the names in `sources` and `mixture` without reading any file.

    Raises:
      UserError: a name is malformed, or the two do not match, or `held_out_share` is
        negative and not the value that lets the data decide.
    """
    if BY_SIZE < config.held_out_share < 0:
        raise UserError(
            f"config.text.held_out_share is {config.held_out_share:g}; it must be in 0 "
            f"to 0.5, or {BY_SIZE:g} to be chosen by the size of the text"
        )
    mixture_weights(config, list(_places(config)))


def _places(config: TextConfig) -> dict[str, str]:
    """`{name: where}`."""
    if not config.sources:
        raise UserError("config.text.sources is empty; give name=where at least once")
    places: dict[str, str] = {}
    for written in config.sources:
        name, equals, where = written.partition("=")
        if not equals or not where or not SOURCE_NAME.fullmatch(name):
            place = config.sources.index(written)
            ready = list(config.sources)
            ready[place : place + 1] = written_list("text.sources", written)
            raise UserError(
                f"config.text.sources has {written!r}; write name=where, where the "
                "name is made of letters, digits, '_', '.' and '-': "
                f"{shell_flag('text.sources', ready)}"
            )
        if name in places:
            raise UserError(
                f"config.text.sources has two named {name!r}; rename one of them"
            )
        places[name] = where
    return places


def open_sources(
    text: TextConfig, data: DataConfig, knob: str = "config.text.sources"
) -> list[TextSource]:
    """Lists the files of all sources in `text`; reads none of them.

    `knob` is the one that the user gave them by.

    Raises:
      UserError: a source is not `name=where`, or does not exist.
    """
    sources = []
    hard_cut = text.hard_cut.replace("\\n", "\n").replace("\\t", "\t")
    for name, where in _places(text).items():
        files, revision = _locate(name, where, data.hub_timeout, knob)
        sources.append(
            TextSource(
                name, where, files, revision, text.column, text.undecodable,
                data.bad_lines, hard_cut,
            )
        )  # fmt: skip
    return sources


def _locate(
    name: str, where: str, timeout: float, knob: str
) -> tuple[tuple[SourceFile, ...], str]:
    if where == "stdlib":
        return tuple(_stdlib()), ""
    if is_hub(where):
        address = HubAddress.parse(where, "dataset")
        commit = require_commit(address, f"text source {name}={where}", timeout)
        return (SourceFile(address.name, Path(where), 0),), commit
    what = f"text source {name}={where} of {knob}"
    path = local_path(where, f"text source {name} of {knob}", "dataset")
    if path.is_file():
        return (SourceFile(path.name, path, path.stat().st_size),), ""
    if not path.is_dir():
        how = f"give stdlib, a file or a folder; {how_on_hub(where, 'dataset')}"
        if set(where) & set("*?["):
            how = f"it takes no patterns: {how}"
        raise no_such(what, path, how)
    files = tuple(_files_under(path, lambda name: not name.startswith(".")))
    if not files:
        raise UserError(f"{what} has no files; hidden ones do not count")
    return files, ""


def _files_under(folder: Path, wanted: Callable[[str], bool]) -> Iterator[SourceFile]:
    """Files in the order of their names, if every part of the path is wanted.

    Those of runs are nobody's text. Links to folders are followed after the real
    folders, and no folder is read twice, so a circle of links ends. A link to a folder
    above itself is only a circle.
    """
    found: list[Path] = []
    seen: set[Path] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"text folder {folder} cannot be read: {error}") from error

    waiting = [folder]
    while waiting:
        for at, folders, names in os.walk(waiting.pop(0), onerror=refuse):
            real = Path(at).resolve()
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(
                x for x in folders if wanted(x) and not holds_run(Path(at, x))
            )
            links = [path for name in folders if (path := Path(at, name)).is_symlink()]
            waiting += [p for p in links if not real.is_relative_to(p.resolve())]
            found += [Path(at, name) for name in names if wanted(name)]
    for path in sorted(found, key=lambda path: path.relative_to(folder).parts):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            yield SourceFile(name, path, path.stat().st_size)
        elif path.is_symlink():
            logging.warning("text: %s is a link that leads to no file", path)


def _stdlib() -> Iterator[SourceFile]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for item in _files_under(folder, lambda name: name not in STDLIB_SKIPPED):
        generated = item.path.name.startswith("_sysconfigdata")
        if item.path.suffix == ".py" and not generated and item.size < STDLIB_LARGEST:
            yield item


def mixture_weights(config: TextConfig, names: Sequence[str]) -> dict[str, float]:
    """Shares by source name that sum to 1; empty where `mixture` is empty.

    Raises:
      UserError: an unknown name, a weight that is not a number of at least 0, or a
        source without a weight.
    """
    weights: dict[str, float] = {}
    for written in config.mixture:
        name, equals, number = written.partition("=")
        if not equals:
            raise UserError(f"config.text.mixture has {written!r}; write name=weight")
        if name not in names:
            raise UserError(
                f"config.text.mixture has {written!r}, and no source is named {name!r}"
                f"{nearest(name, names)}; config.text.sources has {', '.join(names)}"
            )
        if name in weights:
            raise UserError(f"config.text.mixture names {name!r} twice; keep one")
        weights[name] = _weight(written, number)
    if not weights:
        return {}
    missing = [name for name in names if name not in weights]
    if missing:
        raise UserError(
            f"config.text.mixture has no weight for {', '.join(missing)}; give one, "
            f"or {missing[0]}=0 to only evaluate on it"
        )
    total = sum(weights.values())
    if total <= 0:
        raise UserError("config.text.mixture is all zeros; raise at least one weight")
    return {name: weights[name] / total for name in names}


def _weight(written: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(
            f"config.text.mixture has {written!r}; the weight must be a number of at "
            "least 0"
        )
    return weight
