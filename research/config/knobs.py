"""Dataclasses of knobs: help texts, strict building, flat views. Knows no knob.

A group of knobs is a frozen dataclass whose fields are knobs or further groups.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from research.core.errors import UserError, nearest

if TYPE_CHECKING:
    # Only the doors need it: the core must run on a bare accelerator image.
    import ml_collections

T = TypeVar("T")


def knob(default: Any, help: str, *, fixed: bool = True) -> Any:
    """A field with its help text. `fixed`: a resumed run must not change it."""
    metadata = {"help": help, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


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


def to_config_dict(config: Any) -> "ml_collections.ConfigDict":
    """The same groups and values, not locked."""
    import ml_collections

    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = to_config_dict(value)
        else:
            result[field.name] = value
    return result


def build(cls: type, values: Any, path: str) -> Any:
    """An instance of the group `cls` from nested mappings.

    Raises:
      UserError: a field is unknown, missing or of another type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is {values!r}; it must be a group of fields")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(
                f"{path}.{name} is not a field{nearest(name, hints)}; "
                f"{path} has {', '.join(hints)}"
            )
    missing = [name for name in hints if name not in values]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: start from research.config.defaults()"
        )
    return cls(
        **{
            name: build(hint, values[name], f"{path}.{name}")
            if dataclasses.is_dataclass(hint)
            else _coerce(hint, values[name], f"{path}.{name}")
            for name, hint in hints.items()
        }
    )


def changed(config: T, changes: Mapping[str, Any], where: str) -> T:
    """`config` with other values of some knobs, `{"lora.rank": 8}`.

    Raises:
      UserError: there is no such knob, or the value does not fit; it begins `where`.
    """
    values = to_config_dict(config).to_dict()
    known = flat(config)
    for name, value in changes.items():
        if name not in known:
            raise UserError(f"{where}: {name!r} is not a knob{nearest(name, known)}")
        *groups, last = name.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[last] = value
    try:
        return build(type(config), values, "config")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint`; only int -> float and list -> tuple change anything."""
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)[0]
        return tuple(_coerce(inner, item, path) for item in value)
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if origin is None and type(value) is hint and hint is not float:
        return value
    shown = hint.__name__ if origin is None else str(hint)
    raise UserError(f"{path} is {value!r} ({type(value).__name__}); it must be {shown}")
