"""The content of a sweep file: a config, axes to vary it along, seeds, a metric."""

import dataclasses
import math
import random
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.config.config_file import call_in_file
from research.config.field_names import READERS
from research.config.knobs import bare_type, fields
from research.config.run_config import Config
from research.core.errors import UserError, nearest

Changes = Mapping[str, Any]
Draw = Callable[[random.Random], Any]


@dataclasses.dataclass(frozen=True)
class Axis:
    """One dimension of a sweep.

    Attributes:
      name: its name in tables and in the names of runs.
      points: the knobs of each value by label, as `{"16": {"lora.rank": 16}}`.
    """

    name: str
    points: Mapping[str, Changes]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs that answer one question: every combination, with every seed.

    Attributes:
      config: config file that all runs start from.
      axes: the sweep has every combination of their values.
      seeds: seeds of each combination; points are compared seed by seed.
      changes: knobs to change in all runs.
      baseline: the point that the others are compared with, as `{axis: label}`; an axis
        that it does not name has its first label.
      metric: loss, bits_per_byte or loss/CATEGORY of the last evaluation; less is
        better.
      question: a paragraph for the report; by default the file's docstring.
    """

    config: str
    axes: Sequence[Axis]
    seeds: Sequence[int] = (0, 1, 2)
    changes: Changes = dataclasses.field(default_factory=dict)
    baseline: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metric: str = "loss"
    question: str = ""


def grid(knob: str, *values: Any) -> Axis:
    """An axis of values of one knob."""
    return Axis(knob, _labelled([{knob: value} for value in values]))


def listed(name: str, **points: Changes) -> Axis:
    """An axis whose values set several knobs or none: `full={"trainable": "full"}`."""
    return Axis(name, points)


def sampled(name: str, count: int, seed: int, **draws: Draw) -> Axis:
    """An axis of `count` random points; each knob is drawn independently.

    Write two underscores for a dot: `optim__learning_rate=log(1e-5, 1e-3)`.
    Bergstra and Bengio 2012, Random Search for Hyper-Parameter Optimization.
    """
    rng = random.Random(seed)
    knobs = {knob.replace("__", "."): draw for knob, draw in draws.items()}
    points = [{knob: draw(rng) for knob, draw in knobs.items()} for _ in range(count)]
    return Axis(name, _labelled(points))


def log(low: float, high: float) -> Draw:
    """Draws log-uniformly between the bounds, rounded to three digits."""
    return lambda rng: float(
        f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}"
    )


def uniform(low: float, high: float) -> Draw:
    """Draws uniformly between the bounds, rounded to three digits."""
    return lambda rng: float(f"{rng.uniform(low, high):.3g}")


def choice(*values: Any) -> Draw:
    """Draws one of the values."""
    return lambda rng: rng.choice(values)


def of_axes(
    written: Sequence[str], arguments: Sequence[str]
) -> tuple[Sweep, list[str]]:
    """A sweep without a file, from `KNOB=A,B` for each axis and the trainer's flags.

    Within a value, `+` stands between the items of a list, as in
    `lora.targets=attention,attention+mlp`.

    Returns:
      The sweep, and the flags of the trainer but for `--config`.

    Raises:
      UserError: the config file is missing, or an axis is none.
    """
    configs = [x for x in arguments if x.lstrip("-").startswith("config=")]
    if len(configs) != 1:
        raise UserError(
            f"--axis needs one --config=FILE.py after --, and there are {len(configs)}"
        )
    axes = [_read_axis(text) for text in written]
    names = " and ".join(axis.name for axis in axes)
    config = configs[0].partition("=")[2]
    rest = [word for word in arguments if word not in configs]
    return Sweep(config, axes, question=f"Which value of {names} is best?"), rest


def _read_axis(text: str) -> Axis:
    knob, _, values = text.partition("=")
    kinds = {path: field.type for path, field, _ in fields(Config())}
    if knob not in kinds:
        raise UserError(
            f"--axis={text}: {knob!r} is no knob{nearest(knob, kinds)}; write "
            "--axis=KNOB=A,B"
        )
    kind = bare_type(kinds[knob])
    found = []
    for value in map(str.strip, values.split(",")):
        if typing.get_origin(kind) is tuple:
            found.append(tuple(filter(None, value.split("+"))))
            continue
        try:
            found.append(READERS.get(kind, str)(value))
        except (ValueError, KeyError):
            name = kind.__name__
            raise UserError(f"--axis={text}: {value!r} is no {name}") from None
    return grid(knob, *found)


def _labelled(points: Sequence[Changes]) -> dict[str, Changes]:
    """Labels points by their values; a UserError if two have the same label."""
    found: dict[str, Changes] = {}
    for point in points:
        several = len(point) > 1
        label = " ".join(
            f"{knob.rpartition('.')[2]}={shown(value)}" if several else shown(value)
            for knob, value in point.items()
        )
        if label in found:
            raise UserError(f"two values of an axis are {label!r}; give each once")
        found[label] = point
    return found


def shown(value: Any) -> str:
    """A value as tables show it."""
    if isinstance(value, tuple | list):
        return "+".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def load(file: str) -> Sweep:
    """Calls `get_sweep()` of a sweep file.

    Raises:
      UserError: there is no such file or function, or it fails.
    """
    module, found = call_in_file(f"--sweep={file}", file, "get_sweep")
    if not isinstance(found, Sweep):
        raise UserError(f"--sweep={file}: get_sweep() must return a Sweep")
    config = found.config
    if not Path(config).exists():  # As seen from a folder above the sweep file.
        above = (parent / config for parent in Path(file).absolute().parents)
        config = next((str(path) for path in above if path.is_file()), config)
    paragraph = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    question = found.question or paragraph
    return dataclasses.replace(found, config=config, question=question)
