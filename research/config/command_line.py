"""Command lines: parsing that names what is wrong, and one way out for user errors."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from research.config.knobs import flat
from research.config.run_config import Config, from_config_dict, help_text
from research.core.errors import PREEMPTED, UserError, nearest

CONFIG_HELP = """
Any knob of the config can be set on the command line; the config file says what
differs from these defaults:

{knobs}
"""


def define_config() -> None:
    """The `--config=FILE.py` flag with its `--config.KNOB=VALUE` overrides."""
    config_flags.DEFINE_config_file("config", None, "config file, see configs/")


def parse(
    argv: Sequence[str], usage: str, *, has_config: bool, verbs: Sequence[str] = ()
) -> str:
    """Parses into `absl.flags.FLAGS`; `--help` prints `usage` and exits with 0.

    Returns:
      The word among the arguments that is one of `verbs`, by default the first.

    Raises:
      UserError: an unknown flag or knob, or a value of the wrong type.
    """
    if {"--help", "-h", "-help", "--helpfull"} & set(argv[1:]):
        sys.stdout.write(_help(usage, has_config))
        sys.exit(0)
    if has_config:
        _check_overrides(argv[1:])
    try:
        rest = flags.FLAGS(list(argv))
    except (flags.Error, TypeError, ValueError, AttributeError, OSError) as error:
        raise UserError(f"{_without_dump(error)}; see --help") from error
    for word in rest[1:]:
        if word not in verbs or len(rest) > 2:
            known = f" (or one of {', '.join(verbs)})" if verbs else ""
            raise UserError(f"unexpected argument {word!r}; flags start with --{known}")
    return rest[1] if rest[1:] else next(iter(verbs), "")


def _without_dump(error: Exception) -> str:
    """The message without the field list or traceback that ml_collections adds."""
    said, dump, rest = str(error).partition(". Other fields present")
    said = f"{said}. {rest.splitlines()[-1]}" if dump else said
    where, traceback, rest = said.partition("Traceback (most recent call last):")
    return f"{where.split()[1]} {rest.splitlines()[-1]}" if traceback else said


def _help(usage: str, has_config: bool) -> str:
    own = flags.FLAGS.get_flags_for_module(sys.modules["__main__"])
    listed = "\n".join(
        f"  --{flag.name}={flag.default!r}\n      {flag.help}"
        for flag in own
        if flag.name != "config"
    )
    knobs = CONFIG_HELP.format(knobs=help_text()) if has_config else ""
    return f"{usage.strip()}\n\n{listed}\n{knobs}"


def _check_overrides(argv: Sequence[str]) -> None:
    """The nearest name for a mistyped knob; absl would show a traceback."""
    knobs = flat(Config())
    if not any(a.partition("=")[0].lstrip("-") == "config" for a in argv):
        raise UserError("--config=FILE.py is missing; see configs/ and --help")
    for argument in argv:
        name = argument.partition("=")[0].lstrip("-")
        if name.startswith("config.") and name[len("config.") :] not in knobs:
            raise UserError(
                f"--{name} is not a knob"
                f"{nearest(name, [f'config.{knob}' for knob in knobs])}; --help lists "
                "them all"
            )


def config_from_flags() -> Config:
    """The frozen config of the `--config` flag."""
    try:
        config = flags.FLAGS.config
        if config is None:
            raise UserError("--config=FILE.py is missing; see configs/ and --help")
        return from_config_dict(config)
    except UserError:
        raise
    except Exception as error:  # A config file is code: it can fail in any way.
        name = next((a for a in sys.argv if a.startswith("--config=")), "--config")
        cause = error.__cause__ or error
        raise UserError(
            f"{name} cannot be loaded: {type(cause).__name__}: "
            + " ".join(str(cause).split())
        ) from error


def resume_after_sigterm() -> None:
    """From here on SIGTERM ends this process at once, with the code that asks for it.

    Imports and the search for other processes take many seconds in which there is
    nothing to save; whoever has more to lose listens in its own way from then on.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    # No buffered stream: the signal may have come within a write to one.
    said = b"stopped by SIGTERM outside of training; the same command resumes the run\n"
    os.write(sys.stderr.fileno(), said)
    os._exit(PREEMPTED)


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Calls `main(sys.argv)`; a UserError ends in one message and its exit code."""
    try:
        sys.exit(main(sys.argv))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except PermissionError as error:
        sys.stderr.write(f"error: no permission: {error}; check the path's owner\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
