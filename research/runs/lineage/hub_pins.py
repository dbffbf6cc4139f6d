"""The commits of a run's hub addresses, so that a later start reads the same files.

An address such as `hub://owner/name` or `hub://owner/name@main` stands for another
commit after each change upstream, and `RUN` or `RUN@best` for another step after more
training. A run resolves them once. Its config then has commits and steps in their
place, and `hub_revisions.json` says what stood there.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping

from research.config.choices import EMBEDDED, ROW_SOURCES
from research.config.run_config import Config
from research.core.errors import look_up
from research.core.hub_access import (
    ADDRESS,
    COMMIT,
    HubAddress,
    is_hub,
    require_commit,
    resolve,
)
from research.core.local_paths import split_step

Pins = dict[str, str]


def resolve_addresses(
    config: Config, known: Mapping[str, str], *, asking: bool = True
) -> Pins:
    """`{address: the same at a commit}` for the hub addresses of `config`.

    An empty `data.path` stands for the default rows, or for the embedded sample where
    the hub does not answer. Another address must stand for a commit: a run that began
    without one could read other files at its next start.

    Args:
      config: of the run.
      known: earlier answers, which are kept.
      asking: whether the hub is asked; otherwise addresses are only checked.

    Raises:
      UserError: an address is malformed, or stands for no commit, neither on the hub
        nor in its local cache.
    """
    pins = dict(known)
    default = look_up(ROW_SOURCES, config.data.source, "config.data.source")

    def ask(written: str, kind: str) -> str:
        if written not in pins:
            address = HubAddress.parse(written or default, kind)
            if not asking:
                return written
            timeout = config.data.hub_timeout
            if written:
                commit = require_commit(address, written, timeout)
            else:
                commit = resolve(address, timeout).revision
            at_commit = str(dataclasses.replace(address, revision=commit))
            pins[written] = at_commit if commit else EMBEDDED
        return written

    _mapped(config, ask)
    return pins


def is_pin(value: str) -> bool:
    """Whether `value` can stand in `Pins`: an address at a commit, or `EMBEDDED`."""
    found = ADDRESS.fullmatch(value)
    at_commit = found and COMMIT.fullmatch(found["revision"] or "")
    return value == EMBEDDED or bool(at_commit) or split_step(value)[1].isdecimal()


def pinned(config: Config, pins: Mapping[str, str]) -> Config:
    """`config` with each address of `pins` at its commit, and each run at its step."""
    config = _mapped(config, lambda written, kind: pins.get(written, written))
    start = _at_step(config.model.init_from, pins)
    model = dataclasses.replace(config.model, init_from=start)
    return dataclasses.replace(config, model=model)


def _at_step(written: str, pins: Mapping[str, str]) -> str:
    """`written` at the step of `pins`, however its folder is written there."""
    folder, step = split_step(written)
    for known, pin in pins.items():
        place, wanted = split_step(known)
        same = place == folder or os.path.abspath(place) == os.path.abspath(folder)
        if (number := split_step(pin)[1]) and same and step == wanted:
            return f"{folder}@{number}"
    return written


def _mapped(config: Config, change: Callable[[str, str], str]) -> Config:
    """`config` with `change(address, kind)` in place of each hub address in use."""

    def hub(where: str, kind: str) -> str:
        return change(where, kind) if is_hub(where) else where

    def source(written: str) -> str:
        name, equals, where = written.partition("=")
        return f"{name}{equals}{hub(where, 'dataset')}"

    model, data, text = config.model, config.data, config.text
    model = dataclasses.replace(model, init_from=hub(model.init_from, "model"))
    adapter = hub(config.lora.init_from, "model")
    lora = dataclasses.replace(config.lora, init_from=adapter)
    # An added task may read what either of ours does.
    if data.kind != "instructions":
        text = dataclasses.replace(
            text,
            tokenizer=hub(text.tokenizer, "model"),
            sources=tuple(source(written) for written in text.sources),
        )
    if data.kind != "text":
        path = data.path and hub(data.path, "dataset")
        if data.kind == "instructions" and not path:
            path = change("", "dataset")
        held_out = data.eval_path and hub(data.eval_path, "dataset")
        data = dataclasses.replace(data, path=path, eval_path=held_out)
    return dataclasses.replace(config, model=model, data=data, text=text, lora=lora)
