"""The `config.json` of a run: readable by later versions, and from any folder."""

import contextlib
import dataclasses
import glob
import json
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research.config.choices import normalised
from research.config.data_knobs import (
    BY_SIZE,
    BY_SIZE_SINCE,
    MOST_HELD_OUT,
    NEWEST_EDITION,
)
from research.config.knobs import build, changed, fields, map_paths
from research.config.run_config import Config, fixed_differences
from research.core.errors import UserError, nearest
from research.core.hub_access import is_hub
from research.core.local_paths import (
    expanded,
    holds_adapter,
    holds_run,
    listed_paths,
    split_step,
)

# Entries of the file that are no knobs.
VERSION, FOLDER = "version", "folder"
# Entries of the `config.json` of a model.
OF_MODELS = {"architectures", "model_type"}
# Values of path knobs that name no file.
WORDS = {"", "auto", "byte", "embedded", "stdlib"}


@dataclasses.dataclass(frozen=True)
class KnobChange:
    """One change of the knobs, which makes one version of `config.json`.

    Attributes:
      renamed: new path by old path.
      removed: by path of a knob that is gone, the value that stands for what all runs
        do now. Another value is reported, and the run opens without it.
      added: by path of a new knob, the value that stands for what all runs did before.
        Only knobs whose default is another one need it.
    """

    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    removed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Version N is the state after the first N changes. New ones are added at the end.
CHANGES = (
    KnobChange(renamed={"model.weights": "model.init_from"}),
    KnobChange(added={"data.edition": 1}),
    KnobChange(added={"text.sources": ("stdlib=stdlib",)}),
    KnobChange(removed={"model.base_format": "plain"}),
)


def to_json(config: Config) -> str:
    """The text of a `config.json`, with the version and the working folder of now."""
    start = {VERSION: len(CHANGES), FOLDER: str(Path.cwd())}
    # ASCII, because a path may hold bytes that no encoding of text can carry.
    return json.dumps(start | dataclasses.asdict(config), indent=2)


def from_json(text: str, run: Path | None = None) -> Config:
    """Undoes `to_json`, and reads files of earlier versions.

    A knob that the earlier version did not have gets the value that stands for what
    runs did then; see `CHANGES`.

    Args:
      text: content of the file.
      run: the run directory that the file lies in; relative paths then become
        absolute, see `with_absolute_paths`. By default all knobs are as written.

    Raises:
      UserError: a newer version wrote it, or a field is unknown, of another type or
        out of range.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise UserError(f"it holds {values!r}, and not the knobs by group")
    version, folder = values.pop(VERSION, 0), str(values.pop(FOLDER, ""))
    if type(version) is not int or not 0 <= version <= len(CHANGES):
        raise UserError(
            f"it has version {version!r}, and this program reads versions 0 to "
            f"{len(CHANGES)}: use the newer program that wrote it"
        )
    for change in CHANGES[version:]:
        _apply(change, values)
    config = build(Config, _filled(dataclasses.asdict(Config()), values), "config")
    if run is None:
        return config
    return with_absolute_paths(config, Path(folder or _guess_folder(config, run)))


def model_and_no_run(written: str) -> str:
    """The rest of a sentence about a model in the place of a run; "" for all else.

    Args:
      written: the name of a run, by a user who may mean a model: its folder, its
        `.gguf` file, or its address.
    """
    is_model = written.endswith(".gguf") or is_hub(written) or "pkg://" in written
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(Path(expanded(written), "config.json").read_bytes())
        if isinstance(values, dict) and VERSION not in values:
            is_model |= not OF_MODELS.isdisjoint(values)
    if not is_model:
        return ""
    return (
        f"is a model, and no run: give it as --model={written} to research.generate or "
        f"research.serve, or as --config.model.init_from={written} to research.train"
    )


def as_run(word: str) -> str:
    """The flag for a word of a command line that is the folder of a run, or ""."""
    flag = shlex.quote(f"--run={word}")
    return f" (did you mean {flag}?)" if holds_run(Path(expanded(word))) else ""


def near_run(path: Path) -> str:
    """Where a run is, for a path that is none: the end of a sentence about it."""
    if holds_adapter(path):
        return (
            "; it is an adapter folder of PEFT, which research.generate, serve, "
            "evaluate and export open as --run, and of which this makes a run that "
            "computes the same: python -m research.train --config=CONFIG "
            f"--config.lora.init_from={shlex.quote(str(path))} --config.steps=1 "
            "--config.optim.learning_rate=1e-30"
        )

    def runs_in(folder: Path) -> list[str]:
        return sorted(str(file.parent) for file in folder.glob("*/config.json"))

    if found := next(filter(holds_run, path.parents), None):
        return f" (did you mean {str(found)!r}?)"
    if inside := [run for run in runs_in(path) if holds_run(Path(run))]:
        more = f" and {len(inside) - 8} more" if len(inside) > 8 else ""
        return f"; it holds the runs {', '.join(inside[:8])}{more}"
    return nearest(str(path), runs_in(path.parent))


def _guess_folder(config: Config, run: Path) -> Path:
    """The folder of a start of version 0, which did not write it down."""
    given, place = Path(config.run_dir), run.absolute()
    count = len(given.parts)
    known = not given.is_absolute() and place.parts[-count:] == given.parts
    return place.parents[count - 1] if known else Path.cwd()


def _apply(change: KnobChange, values: dict[str, Any]) -> None:
    """Brings nested `values` of the version before `change` to the version after it."""
    for old, new in change.renamed.items():
        found = _pop(values, old)
        if found is not None:
            _set_missing(values, new, found)
    for path, harmless in change.removed.items():
        found = _pop(values, path)
        if found not in (None, harmless):
            logging.warning("config.%s=%r is gone; the run opens without", path, found)
    for path, before in change.added.items():
        _set_missing(values, path, before)


def _pop(values: dict[str, Any], path: str) -> Any:
    """Removes the knob at `path`, and a group that is empty then; returns its value.

    None stands for a knob that is not there.
    """
    name, _, rest = path.partition(".")
    inner = values.get(name)
    if not rest:
        return values.pop(name, None)
    found = _pop(inner, rest) if isinstance(inner, dict) else None
    if inner == {}:
        del values[name]
    return found


def _set_missing(values: dict[str, Any], path: str, value: Any) -> None:
    *groups, name = path.split(".")
    for group in groups:
        values = values.setdefault(group, {})
    values.setdefault(name, value)


def _filled(known: dict[str, Any], values: Any) -> Any:
    """`values`, where entries that are missing come from `known`, group by group."""
    if not isinstance(values, dict):
        return values
    groups = {name for name in values if isinstance(known.get(name), dict)}
    return (
        known | values | {name: _filled(known[name], values[name]) for name in groups}
    )


def with_absolute_paths(config: Config, folder: Path) -> Config:
    """`config`, where paths that are relative and exist below `folder` are absolute."""
    folder = folder.absolute()
    places = {
        path: map_paths(field, value, lambda written: _absolute(written, folder))
        for path, field, value in fields(config)
    }
    return changed(config, places, "the paths of the config")


def _absolute(written: str, folder: Path) -> str:
    """`written` may name no file at all."""
    if written in WORDS or "://" in written:
        return written
    if len(parts := listed_paths(written, folder)) > 1:
        return ",".join(_absolute(part, folder) for part in parts)
    path = Path(written)
    first = path.parts[0] if path.parts else ""
    # A pattern such as `shards/*.parquet` is no file, and its first part is. A run may
    # have a step behind it.
    place = split_step(str(folder / first))[0]
    known = glob.has_magic(first) or os.path.exists(place)
    return str(folder / path) if known else written


def differences(
    text: str,
    config: Config,
    run: Path,
    alike: Callable[[Config], Config] = lambda config: config,
) -> dict[str, str]:
    """The knobs that `config` may not change, as `old -> new` by name.

    A path counts as the same if it is written in the same way, which holds after the
    run and its data have moved, or if it leads to the same place.

    Args:
      text: content of the `config.json` of the run that is resumed.
      config: relative paths in it are below the working folder.
      run: the run directory.
      alike: is applied to both sides, so that values that mean the same are equal.
    """

    def alike_all(config: Config) -> Config:
        formats = normalised(config.model.quantize_paths)
        model = dataclasses.replace(config.model, quantize_paths=formats)
        return alike(dataclasses.replace(config, model=model))

    written = fixed_differences(alike_all(from_json(text)), alike_all(config))
    here = with_absolute_paths(config, Path.cwd())
    other_places = fixed_differences(alike_all(from_json(text, run)), alike_all(here))
    return {name: written[name] for name in written if name in other_places}


def with_edition(config: Config, edition: int) -> Config:
    """`config`, where the rows have the rules of `edition` if it names no other."""
    data = dataclasses.replace(config.data, edition=config.data.edition or edition)
    if data.edition < BY_SIZE_SINCE and data.held_out == BY_SIZE:
        data = dataclasses.replace(data, held_out=float(MOST_HELD_OUT))
    return dataclasses.replace(config, data=data)


def as_begun(config: Config, old: Config | None) -> Config:
    """`config`, where it leaves a choice to the data, with the choice of its run.

    `old` is the config that the run began with; None where it begins now.
    """
    config = with_edition(config, old.data.edition if old else NEWEST_EDITION)
    if old is None or config.text.held_out_share != BY_SIZE:
        return config
    text = {"held_out_share": old.text.held_out_share}
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **text))
