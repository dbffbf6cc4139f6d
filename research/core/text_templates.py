"""Fills the Jinja templates of reports, manifests and scripts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2.sandbox


def fill(
    template: Path,
    write: Callable[[Any], Any] | None = None,
    *,
    filters: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
    autoescape: bool = False,
    base: Path | None = None,
    **values: Any,
) -> str:
    """The text of a template; `write` turns each of its values into text.

    It can begin with `{% extends base %}`, and then fills the blocks of `base`.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        finalize=write,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    if base:
        values["base"] = environment.from_string(base.read_text(encoding="utf-8"))
    text = template.read_text(encoding="utf-8")
    return environment.from_string(text).render(values)
