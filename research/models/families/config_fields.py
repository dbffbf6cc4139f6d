"""Fields of another tool's config file, checked as they are read."""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.models.architecture import Architecture, RopeScaling

ROPE_TYPES = ("default", "linear", "llama3")
LARGEST = 2**31 - 1  # of any dimension


class ConfigFields:
    """A JSON object whose getters check types; null counts as absent.

    Every getter raises a UserError that names the file, the field, what was found and
    what is right. A getter without a default needs the field.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = {k: v for k, v in values.items() if v is not None}
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The unchecked value."""
        return self._values.get(name, default)

    def present(self) -> dict[str, Any]:
        """All values, unchecked."""
        return dict(self._values)

    def integer(
        self,
        name: str,
        default: int | None = None,
        *,
        low: int = 1,
        high: int = LARGEST,
        multiple_of: int = 1,
    ) -> int:
        value = self._needed(name, default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high or value % multiple_of:
            right = f"a whole number from {low} to {high}"
            if multiple_of > 1:
                right = f"a multiple of {multiple_of} and {right}"
            raise self.wrong(name, value, right)
        return value

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        above: float = 0,
        high: float = 1e30,
    ) -> float:
        value = self._needed(name, default)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not above < value <= high:
            raise self.wrong(name, value, f"a number above {above:g} up to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._needed(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._needed(name, default)
        if not is_text(value):
            raise self.wrong(name, value, "text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._needed(name, None)
        if not isinstance(value, list) or not all(map(is_text, value)):
            raise self.wrong(name, value, "a list of texts")
        return value

    def group(self, *names: str) -> "ConfigFields":
        """The objects `names` as one: later ones win, absent ones are empty."""
        together: dict[str, Any] = {}
        for name in names:
            value = self._values.get(name, {})
            if not isinstance(value, dict):
                raise self.wrong(name, value, "an object with named fields, or null")
            together |= value
        present = [name for name in names if name in self._values] or names
        return ConfigFields(together, f"{self.where}, in {' and '.join(present)}")

    def only(self, name: str, allowed: Any) -> None:
        """Refuses any value but `allowed` and an absent one.

        A model that computes something else must not load as if it did not.
        """
        value = self._values.get(name, allowed)
        if value != allowed:
            raise self.wrong(name, value, f"{allowed!r}, the only value computed here")

    def _needed(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is None:
            raise UserError(f"{self.where} lacks {name}")
        return value

    def wrong(self, name: str, value: Any, right: str) -> UserError:
        """The error for a field that has a `value` other than what is `right`."""
        found = repr(value)
        found = found if len(found) <= 80 else f"{found[:80]}..."
        return UserError(f"{self.where}: {name} is {found}; it must be {right}")


def is_text(value: Any) -> bool:
    """Whether it is text, in which JSON allows half a character; nobody else does."""
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode()


def read_rope(fields: ConfigFields) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary embedding.

    Both spellings are understood: `rope_parameters` (transformers 5), and `rope_theta`
    with `rope_scaling` (before).

    Raises:
      UserError: a field is malformed, or asks for a scaling that is not computed.
    """
    rope = fields.group("rope_scaling", "rope_parameters")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    for group in (fields, rope):
        group.only("partial_rotary_factor", 1.0)
    for layers in ("full_attention", "sliding_attention"):
        rope.only(layers, None)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{rope.where}: rope_type is {kind!r}; it must be one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        return theta, RopeScaling()
    factor = rope.number("factor", above=0, high=1e6)
    if factor < 1:
        raise rope.wrong("factor", factor, "at least 1")
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=factor)
    low = rope.number("low_freq_factor")
    original = "original_max_position_embeddings"
    longest = fields.integer("max_position_embeddings", 2048)
    return theta, RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=low,
        # Wavelengths between the two are interpolated, so they must differ.
        high_freq_factor=rope.number("high_freq_factor", above=low),
        # As transformers reads it: outside the object first, then inside.
        original_max_position=fields.integer(original, rope.integer(original, longest)),
    )


def write_rope(a: Architecture) -> dict[str, Any]:
    """The fields that `read_rope` reads, in the spellings of both kinds of readers."""
    scaling = a.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "default":
        rope["factor"] = scaling.factor
    if scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return {
        "rope_theta": a.rope_theta,
        "rope_scaling": None if scaling.kind == "default" else rope,
        "rope_parameters": rope | {"rope_theta": a.rope_theta},
    }
