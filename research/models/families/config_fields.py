"""Fields of another tool's config file, checked as they are read."""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError

LARGEST = 2**31 - 1  # of any dimension


class ConfigFields:
    """A JSON object whose getters check types; null counts as absent.

    Only `with_defaults` tells the two apart: null stays null there.

    Every getter raises a UserError that names the file, the field, what was found and
    what is right. A getter without a default needs the field.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = {k: v for k, v in values.items() if v is not None}
        self._null = values.keys() - self._values.keys()
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

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        value = self._needed(name, None)
        known = isinstance(value, list) and all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e30
            for x in value
        )
        if not known or len(value) != count:
            raise self.wrong(name, value, f"a list of {count} numbers above 0")
        return tuple(map(float, value))

    def with_defaults(self, **values: Any) -> "ConfigFields":
        """The same fields, with these values where a field is absent."""
        nulls = dict.fromkeys(self._null)
        return ConfigFields(values | self._values | nulls, self.where)

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
