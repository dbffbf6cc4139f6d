"""Command lines: parsing that names what is wrong, and one way out for user errors.

The flags of a door are a group of knobs, see `knobs.py`. Nothing is defined in
`absl.flags.FLAGS`: doors can be imported side by side and called repeatedly.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_flags

from research.config import help_text
from research.config.config_file import (
    find_run,
    folder_of_run,
    load_config_file,
    locate,
    without_dump,
)
from research.config.cross_knob_rules import check_effects
from research.config.field_names import (
    ELSEWHERE,
    HERE,
    LISTS,
    GivenFlag,
    explain_flag,
    given_flags,
    repeats,
    shell_flag,
    written_list,
)
from research.config.knobs import (
    bare_type,
    check_limits,
    facts_of,
    fields,
    flat,
    map_paths,
)
from research.config.run_config import BY_EPOCHS, Config, from_config_dict
from research.config.saved_config import as_run, from_json
from research.core import standard_streams
from research.core.errors import SaveError, UserError, nearest
from research.core.local_paths import expanded, local_path, split_step

T = TypeVar("T")
# Seconds that a reader of standard output may hold a training before text is dropped.
OUTPUT_WAIT = 5.0
# The words of JAX's import about a variable of the environment that it cannot read.
JAX_REFUSES = re.compile(
    r"for environment '(?P<variable>JAX_\w+)'|"
    r"^Invalid value .* for JAX flag (?P<flag>\w+)"
)
# Words of Python about text that should be a number, and plain ones.
NUMBERS = (
    ("invalid literal for int() with base 10:", "this is no whole number:"),
    ("could not convert string to float:", "this is no number:"),
)
CONFIG_ENDS = (".py", ".yml", ".yaml", ".json", ".toml")
# The words of ml_collections about a list that it cannot read.
NO_LIST = re.compile(
    r"--config\.([\w.]+)=(.*)(?=: Error while parsing string: .* as tuple)", re.DOTALL
)
HELP_FLAGS = {"--help", "-h", "-help", "--helpfull"}


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """The flags of a command that has only config knobs."""


def parse(argv: Sequence[str], usage: str, options: type[T]) -> T:
    """Parses the flags of a door.

    `--help` prints `usage` and all flags, `--help=FLAG` one of them; both exit with 0.

    Args:
      argv: the command, then its arguments.
      usage: first part of the help.
      options: a group of knobs, the flags. If it has a field `verb`, that takes the
        one argument that is not a flag. A field `run` of one text is a run directory,
        which may also be given as its config.json or as its config file.

    Raises:
      UserError: an unknown flag, one that has two values, or a value of the wrong type
        or out of range.
    """
    argv = _with_flagfiles(argv)
    _answer_help(argv, usage, options, has_config=False)
    given = [*given_flags(argv[1:], options, {})]
    _check_flags(given, options, has_config=False)
    return _read(_define(options), argv, options)


def parse_with_config(
    argv: Sequence[str], usage: str, options: type[T]
) -> tuple[Config, T]:
    """Like `parse`, for a door that takes `--config=FILE.py` and its knobs.

    `--config=RUN_DIR` stands for the config of that run, whose `run_dir` it is.

    Raises:
      UserError: see `parse`; or the config file is missing, fails or is out of range.
    """
    argv = _with_flagfiles(argv)
    _answer_help(argv, usage, options, has_config=True)
    words = [*given_flags(argv[1:], options, flat(Config()))]
    file = _config_file(words, options)
    known = [flag for flag in words if flag.name != "config"]
    others = [argv[0], *(word for flag in known for word in flag.words)]
    flag_values = _define(options)
    config = load_config_file(file)
    resumed = [from_config_dict(config)] if folder_of_run(file) else []
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=flag_values, sys_argv=others
        )
    except (ValueError, TypeError) as error:  # A value that no flag can have.
        try:
            from_config_dict(config)
        except UserError as cause:
            raise locate(cause, file, others) from error
        raise
    values = _read(flag_values, others, options)
    given = {flag.name.removeprefix("config.") for flag in known}
    config = flag_values["config"].value
    if "epochs" in given and "steps" not in given and config.epochs:
        config.steps = BY_EPOCHS  # A flag is a later word than the file.
    elif "steps" in given and "epochs" not in given and config.steps != BY_EPOCHS:
        config.epochs = 0.0
    try:
        made = from_config_dict(config)
        check_effects(made, Config(), [*resumed, *_saved(made.run_dir)], given)
    except UserError as error:
        raise locate(error, file, others) from error
    return made, values


def parse_with_changes(
    argv: Sequence[str],
    usage: str,
    options: type[T],
    allowed: Sequence[str],
    instead: Mapping[str, str],
) -> tuple[T, dict[str, Any]]:
    """Like `parse`, for a door that takes some knobs of the config of `--run`, too.

    Args:
      argv, usage, options: those of `parse`; `options` has a field `run`.
      allowed: names of knobs, or of groups such as `data.columns`.
      instead: `knob: flag`, for knobs in whose place this door has a flag.

    Returns:
      The flags, and the changed knobs by name.

    Raises:
      UserError: see `parse` and `parse_with_config`; or a knob is not allowed.
    """
    argv = _with_flagfiles(argv)
    knobs = [word for word in argv[1:] if word.lstrip("-").startswith("config.")]
    values = parse([word for word in argv if word not in knobs], usage, options)
    if not knobs:
        return values, {}
    every = flat(Config())
    written = [knob.lstrip("-").partition("=")[::2] for knob in knobs]
    given = {name.partition(".")[2]: value for name, value in written}
    for name, value in given.items():
        is_allowed = any(f"{name}.".startswith(f"{each}.") for each in allowed)
        if is_allowed or name not in every:  # Parsing explains an unknown one.
            continue
        text = ",".join(written_list(name, value)) if name in LISTS else value
        remedy = (
            f"use --{instead[name]}={shlex.quote(text)}"
            if name in instead
            else f"a run keeps its config; only {', '.join(allowed)} can"
        )
        raise UserError(f"--config.{name} cannot be set here: {remedy}")
    runs = typing.cast(Any, values).run  # The config of the first is changed.
    run = runs if isinstance(runs, str) else find_run(split_step([*runs, ""][0])[0])
    config, _ = parse_with_config([argv[0], f"--config={run}", *knobs], usage, NoFlags)
    changed = flat(config)
    return values, {name: changed[name] for name in given}


def _saved(run_dir: str) -> list[Config]:
    """The config of the run in this folder; none if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        file = local_path(run_dir or ".", "config.run_dir") / "config.json"
        return [from_json(file.read_text(encoding="utf-8"))]
    return []


def _with_flagfiles(argv: Sequence[str]) -> Sequence[str]:
    """The command line with the lines of each `--flagfile` in its place."""
    try:
        return [argv[0], *flags.FlagValues().read_flags_from_files(argv[1:])]
    except (flags.Error, OSError, ValueError) as error:
        raise UserError(f"--flagfile: {error.__context__ or error}") from error


def _answer_help(
    argv: Sequence[str], usage: str, options: type, *, has_config: bool
) -> None:
    for argument in argv[1:]:
        name, _, topic = argument.partition("=")
        if name in HELP_FLAGS:
            sys.stdout.write(
                help_text.topic_help(topic, options, has_config=has_config)
                if topic
                else help_text.full_help(usage, options, has_config=has_config)
            )
            sys.exit(0)


def _define(options: type) -> flags.FlagValues:
    """Defines the flags of a group, apart from absl's global flags."""
    flag_values = flags.FlagValues()
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        hint, default = bare_type(hints[field.name]), field.default
        if typing.get_origin(hint) is tuple:
            define, default = flags.DEFINE_multi_string, list(default)
        else:
            define = {
                bool: flags.DEFINE_bool,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
            }.get(hint, flags.DEFINE_string)
        if field.name != "verb":
            define(field.name, default, facts_of(field).help, flag_values=flag_values)
    return flag_values


def _read(flag_values: flags.FlagValues, argv: Sequence[str], options: type[T]) -> T:
    try:
        rest = flag_values(list(argv))
    except (flags.Error, TypeError, ValueError, AttributeError, OSError) as error:
        if found := NO_LIST.search(str(error)):
            ready = shell_flag(found[1], written_list(found[1], found[2]))
            raise UserError(f"{found[0]} is no list: write {ready}") from error
        said = without_dump(error)
        for python, plain in NUMBERS:
            said = said.replace(python, plain)
        raise UserError(f"{said}; see --help") from error
    values = {
        field.name: flag_values[field.name].value
        for field in dataclasses.fields(options)
        if field.name in flag_values
    }
    known = {field.name: field for field in dataclasses.fields(options)}
    verbs = facts_of(known["verb"]).choices if "verb" in known else ()
    for word in rest[1:]:
        if word not in verbs or len(rest) > 2:
            listed = f" (or one of {', '.join(filter(None, verbs))})" if verbs else ""
            near = nearest(word, verbs) or ("run" in known and as_run(word)) or ""
            raise UserError(
                f"unexpected argument {word!r}{near}; flags start with --{listed}"
            )
        values["verb"] = word
    for name, value in values.items():
        value = tuple(value) if type(value) is list else value
        if name == "run" and isinstance(value, str) and value:
            value = find_run(value, facts_of(known[name]).may_be_adapter)
        values[name] = map_paths(known[name], value, expanded)
    result = options(**values)
    check_limits(result, "--")
    return result


def last_of_each(arguments: Sequence[str]) -> tuple[str, ...]:
    """The flags of a training without those that a later one sets again."""
    given = [*given_flags(arguments, NoFlags, flat(Config()))]
    last = {flag.name: flag for flag in given}
    kept = [flag for flag in given if not flag.name or flag is last[flag.name]]
    return tuple(word for flag in kept for word in flag.words)


def _config_file(given: Sequence[GivenFlag], options: type) -> str:
    """The value of `--config`, where all that is given can be used.

    Raises:
      UserError: the flag is missing, a flag has several values, or names are neither
        flags nor knobs; each of them is explained.
    """
    file = next((flag.value for flag in given if flag.name == "config"), "")
    faults = []
    if not file:
        bare = [x.words[0] for x in given if x.words[0].endswith(CONFIG_ENDS)]
        meant = f" (did you mean --config={bare[0]}?)" if bare else ""
        faults.append(
            f"--config=FILE.py is missing{meant}; see configs/ and --help. "
            "--config=RUN_DIR resumes a run"
        )
    _check_flags(given, options, has_config=True, faults=faults)
    return file or ""


def _check_flags(
    given: Sequence[GivenFlag],
    options: type,
    *,
    has_config: bool,
    faults: Sequence[str] = (),
) -> None:
    """Refuses flags with several values, and explains names that are no flags.

    `faults` of the command line that are known already are said first.

    Raises:
      UserError: there is something to refuse.
    """
    lines = [*faults, *repeats(given, _types(options))]
    refused = [
        _explained(flag, options, has_config) for flag in given if not flag.is_known
    ]
    every = "all knobs" if has_config else "all flags"
    if len(refused) == 1:
        lines.append(f"{refused[0]}; --help lists {every}")
    elif refused:
        listed = "\n  ".join(refused)
        lines.append(f"unknown here:\n  {listed}\n--help lists {every}")
    if lines:
        raise UserError("\n".join(lines))


def _types(options: type) -> dict[str, Any]:
    """The type of each flag and knob by name, `Path` where it is a path."""
    hints = typing.get_type_hints(options)
    known = {x.name: (x, bare_type(hints[x.name])) for x in dataclasses.fields(options)}
    known |= {f"config.{name}": (x, type(value)) for name, x, value in fields(Config())}
    return {"config": Path} | {
        name: Path if kind is str and facts_of(field).is_path else kind
        for name, (field, kind) in known.items()
    }


def _explained(flag: GivenFlag, options: type, has_config: bool) -> str:
    """A word that is neither a flag nor a knob, and what to write in its place."""
    own = {field.name: field for field in dataclasses.fields(options)}
    verbs = facts_of(own.pop("verb")).choices if "verb" in own else ()
    every = flat(Config())
    name, _, value = flag.words[0].partition("=")
    if flag.name:
        name, value = flag.name, flag.value
    path = name.removeprefix("config.")
    if not flag.name and (name in (*own, "config") or name != path in every):
        return f"{flag.words[0]} needs dashes: --{flag.words[0]}"
    if flag.name in verbs:
        return f"--{name} is written without dashes: {name}"
    where = HERE if has_config else ELSEWHERE
    said = explain_flag(name, list(own), every, value, where)
    return f"--{name}{said}" if flag.name else f"{name}={said}"


def run(main: Callable[[Sequence[str]], Any], *, prints_results: bool = True) -> None:
    """Calls `main(sys.argv)`; a UserError ends in one message and its exit code.

    Args:
      main: returns the exit code; that of a child may be negative.
      prints_results: lost output is an error. If False, results are files: a reader of
        standard output that has stopped does not hold the command, and text is lost.
    """
    standard_streams.keep_open(None if prints_results else OUTPUT_WAIT)
    try:
        code = main(sys.argv)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except PermissionError as error:
        sys.stderr.write(f"error: no permission: {error}; check the path's owner\n")
        code = 2
    except ValueError as error:
        if not (refused := JAX_REFUSES.search(str(error))):
            raise
        name = (refused["variable"] or refused["flag"]).upper()
        sys.stderr.write(
            f"error: JAX refuses {name}={os.environ.get(name, '')!r} of the "
            "environment; unset it or give a value that JAX knows\n"
        )
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    except SystemExit as ended:
        code = ended.code
    if prints_results and not code and (lost := standard_streams.lost_output()):
        sys.stderr.write(f"error: standard output could not be written: {lost}\n")
        code = SaveError.exit_code
    if isinstance(code, int) and code < 0:
        code = 128 - code  # A child was killed by a signal; shells say it so.
    sys.exit(code)
