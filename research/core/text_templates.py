"""Fills the Jinja templates of reports, manifests and scripts."""

from collections.abc import Callable, Mapping, Sequence
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
    bases: Sequence[Path] = (),
    **values: Any,
) -> str:
    """The text of a template; `write` turns each of its values into text.

    The template may extend those that lie beside it or in one of the folders `bases`.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.FileSystemLoader([template.parent, *bases]),
        finalize=write,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(values)
