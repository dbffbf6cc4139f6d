"""The text of `--help`: flags and knobs with their type, default, choices and range."""

import dataclasses
import functools
import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from research.config.cross_knob_rules import RULES, conditions_of
from research.config.field_names import explain
from research.config.knobs import bare_type, facts_of, fields
from research.config.run_config import Config
from research.core.errors import UserError, nearest

KNOBS_HEADING = """
Every knob of the config can be set on the command line. The config file sets what
differs from the defaults below. --help=optim.schedule explains one knob, --help=optim
lists one group.
"""
WIDTH = 88


def full_help(usage: str, options: type, *, has_config: bool) -> str:
    """The text of `--help`: the door's own words, its flags, and all knobs if it takes
    `--config`.
    """
    own = [f for f in dataclasses.fields(options) if f.name != "verb"]
    flags = "\n".join(_lines(f"--{f.name}", f, f.default) for f in own)
    parts = [usage.strip(), flags] if own else [usage.strip()]
    if has_config:
        parts += [KNOBS_HEADING.strip(), *_group_help(Config(), "config")]
    return "\n\n".join(parts) + "\n"


def topic_help(topic: str, options: type, *, has_config: bool) -> str:
    """The text of `--help=TOPIC`: one flag, one knob or one group of knobs.

    Raises:
      UserError: nothing has that name.
    """
    own = {field.name: field for field in dataclasses.fields(options)}
    if topic.lstrip("-") in own:
        field = own[topic.lstrip("-")]
        return _explain(f"--{field.name}", field, field.default)
    name = topic.lstrip("-").removeprefix("config.")
    knobs = {p: (f, v) for p, f, v in fields(Config())} if has_config else {}
    if name in knobs:
        return _explain_knob(name, *knobs[name])
    groups = {path.rpartition(".")[0] for path in knobs} - {""}
    if name in groups:
        group = functools.reduce(getattr, name.split("."), Config())
        return "\n\n".join(_group_help(group, f"config.{name}")) + "\n"
    said = nearest(name, [*own, *groups]) or explain(name, knobs)
    raise UserError(f"--help={topic}: {name}{said}; --help lists all flags and knobs")


def _group_help(group: Any, path: str) -> Iterator[str]:
    """A paragraph for the knobs of `group`, and one for each group inside it."""
    heading = f"{path}: {(type(group).__doc__ or '').strip()}"
    own, inner = [heading], []
    for field in dataclasses.fields(group):
        value, name = getattr(group, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            inner += _group_help(value, name)
        else:
            own.append(_lines(f"--{name}", field, value))
    yield "\n".join(own)
    yield from inner


def _lines(flag: str, field: Any, value: Any) -> str:
    """The flag with its default, its limits and its meaning."""
    limits = f"({_limits(field)})"
    first = f"  {flag}" if value is None else f"  {flag}={_shown(value)}"
    space = "  " if len(first) + len(limits) + 2 <= WIDTH else "\n      "
    meaning = textwrap.fill(facts_of(field).help, WIDTH, **_indent(6))
    return f"{first}{space}{limits}\n{meaning}"


def _limits(field: Any) -> str:
    facts = facts_of(field)
    if facts.choices:
        return ", ".join(facts.choices)
    return f"{type_name(field.type)}{', ' if facts.range() else ''}{facts.range()}"


def type_name(hint: Any) -> str:
    """`int`, `list of str`: the type of a knob for people."""
    if typing.get_origin(hint) is tuple:
        return f"list of {typing.get_args(hint)[0].__name__}"
    bare = bare_type(hint)
    return bare.__name__ if isinstance(bare, type) else "str"


def _shown(value: Any) -> str:
    return str(value) if type(value) is tuple else json.dumps(value, ensure_ascii=False)


def _indent(columns: int) -> dict[str, Any]:
    return {
        "initial_indent": " " * columns,
        "subsequent_indent": " " * columns,
        "break_long_words": False,
        "break_on_hyphens": False,
    }


def _explain(name: str, field: Any, value: Any, more: str = "") -> str:
    facts = facts_of(field)
    rows = {
        "type": type_name(field.type),
        "default": "" if value is None else _shown(value),
        "choices": ", ".join(facts.choices),
        "range": facts.range(),
    }
    table = "\n".join(f"  {k:<8} {v}" for k, v in rows.items() if v)
    return f"{name}\n{textwrap.fill(facts.help, WIDTH, **_indent(2))}\n{table}\n{more}"


def _explain_knob(path: str, field: Any, value: Any) -> str:
    resume = (
        f"must not change it, unless --config.accept=('{path}',) says so"
        if facts_of(field).fixed
        else "may change it"
    )
    more = [f"  A resumed run {resume}."]
    if conditions := conditions_of(path):
        acts = f"It acts where {' and '.join(map(str, conditions))}."
        more.insert(0, textwrap.fill(acts, WIDTH, **_indent(2)))
    for rule in RULES:
        if path in rule.knobs:
            more.append(textwrap.fill(f"Rule: {rule.meaning}", WIDTH, **_indent(2)))
            others = [x for x in rule.knobs if x != path]
            more.append(f"    It involves {', '.join(others)}.")
    return _explain(f"--config.{path}", field, value, "\n".join(more) + "\n")
