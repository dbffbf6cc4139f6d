"""Dataclasses of knobs: limits, strict building, flat views. Knows no knob.

A group of knobs is a frozen dataclass whose fields are knobs or further groups.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from research.config.field_names import explain
from research.core.errors import UserError, nearest, refuse
from research.core.local_paths import expanded

if TYPE_CHECKING:
    # Only the doors need it: the core must run on a bare accelerator image.
    import ml_collections

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class KnobFacts:
    """The facts about a knob besides its type and default.

    Attributes:
      help: its meaning, without default, choices and range.
      fixed: a resumed run must not change it.
      choices: the values it may have; none: any. The collection is read at each check,
        so a registry that a later room extends can be given itself.
      above, low, high: the limits of a number; `above` itself is not allowed.
      is_path: its values name files or folders, among other things.
      may_be_adapter: a run that it names may be an adapter of PEFT instead.
    """

    help: str
    fixed: bool = True
    choices: Collection[str] = ()
    above: float | None = None
    low: float | None = None
    high: float | None = None
    is_path: bool = False
    may_be_adapter: bool = False

    def range(self) -> str:
        """`greater than 0 and at most 0.5`; empty if any number will do."""
        if self.low is not None and self.high is not None:
            return f"in {self.low:g} to {self.high:g}"
        limits = {
            "greater than": self.above,
            "at least": self.low,
            "at most": self.high,
        }
        return " and ".join(f"{k} {v:g}" for k, v in limits.items() if v is not None)

    def refusal(self, value: Any) -> str:
        """Why the knob may not have `value`, after "is VALUE; "; empty if it may."""
        if value is None:
            return ""
        if self.choices and value not in self.choices:
            listed = ", ".join(self.choices)
            return f"it must be one of {listed}{nearest(value, self.choices)}"
        too_low = self.above is not None and not value > self.above
        too_low |= self.low is not None and not value >= self.low
        too_high = self.high is not None and not value <= self.high
        return f"it must be {self.range()}" if too_low or too_high else ""


def knob(default: Any, help: str, **facts: Any) -> Any:
    """A field of a group that a resumed run must not change; see `KnobFacts`."""
    return dataclasses.field(
        default=default, metadata={"facts": KnobFacts(help, **facts)}
    )


def free_knob(default: Any, help: str, **facts: Any) -> Any:
    """A field of a group that a resumed run may change; see `KnobFacts`."""
    return knob(default, help, fixed=False, **facts)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"lora.rank": 16, ...}`."""
    return {path: value for path, _, value in fields(config, prefix)}


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`(path, field, value)` of every knob."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


def facts_of(field: "dataclasses.Field[Any]") -> KnobFacts:
    """The facts that `knob` put into the field of a group."""
    return field.metadata["facts"]


def map_paths(
    field: "dataclasses.Field[Any]", value: Any, change: Callable[[str], str]
) -> Any:
    """The value of a knob with `change` made to each path that it names, if any."""
    if not facts_of(field).is_path:
        return value
    if isinstance(value, tuple):
        parts = [written.partition("=") for written in value]
        return tuple(
            name + mark + change(where) if mark else change(name)
            for name, mark, where in parts
        )
    return change(value)


def bare_type(hint: Any) -> Any:
    """`float` for `float | None`, the type of a flag without a default."""
    *others, last = typing.get_args(hint) or (hint,)
    return others[0] if others and last is type(None) else hint


def check_limits(config: Any, prefix: str) -> None:
    """Checks every knob of a group against its own choices and range.

    `prefix`, such as "config.", stands before the names of knobs in messages.

    Raises:
      UserError: values are not allowed; the message names all their knobs.
    """
    faults = [
        f"{path} is {value!r}; {refusal}"
        for path, field, value in fields(config, prefix)
        if (refusal := facts_of(field).refusal(value))
    ]
    refuse(faults)


def to_config_dict(config: Any) -> "ml_collections.ConfigDict":
    """The same groups and values, not locked."""
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(config))


def build(cls: type, values: Any, path: str) -> Any:
    """An instance of the group `cls` from nested mappings; `~` begins paths at home.

    Raises:
      UserError: a field is unknown, missing or of another type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is {values!r}; it must be a group of fields")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(
                f"{path}.{name}{explain(name, hints)}; --help lists all knobs"
            )
    missing = [name for name in hints if name not in values]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: start from research.config.defaults()"
        )
    known: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint, value = hints[field.name], values[field.name]
        place = f"{path}.{field.name}"
        if dataclasses.is_dataclass(hint):
            known[field.name] = build(hint, value, place)
        else:
            known[field.name] = map_paths(field, _coerce(hint, value, place), expanded)
    return cls(**known)


def changed(config: T, changes: Mapping[str, Any], where: str) -> T:
    """`config` with other values of some knobs, `{"lora.rank": 8}`.

    Raises:
      UserError: there is no such knob, or the value does not fit; it begins `where`.
    """
    values = dataclasses.asdict(config)
    known = flat(config)
    for name, value in changes.items():
        if name not in known:
            raise UserError(f"{where}: {name!r}{explain(name, known)}")
        *groups, last = name.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[last] = value
    try:
        return build(type(config), values, "config")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # An int beyond all floats.
        return False


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint`; only int -> float and list -> tuple change anything."""
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)[0]
        return tuple(_coerce(inner, item, path) for item in value)
    if hint is float and type(value) in (int, float) and _is_finite(value):
        return float(value)
    if hint is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{path} has {value.bit_length()} bits; it must fit into 64")
    if origin is None and type(value) is hint and hint is not float:
        return value
    shown = hint.__name__ if origin is None else str(hint)
    if hint is type(value) is float:
        shown = f"a finite {shown}"
    raise UserError(f"{path} is {value!r} ({type(value).__name__}); it must be {shown}")
