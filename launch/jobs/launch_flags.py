"""The flag parser of every launch command, and the flags that several targets share."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from research.config.command_line import NoFlags
from research.config.field_names import GivenFlag, explain_flag, given_flags, repeats
from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError, nearest
from research.core.local_paths import expanded


class LaunchParser(argparse.ArgumentParser):
    """Argparse whose errors are one line, as those of all other commands.

    `main_flag`: the flag whose value is meant by a word without a flag.
    """

    def __init__(self, main_flag: str = "", **given: Any) -> None:
        self._main_flag = main_flag
        whole = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=whole, allow_abbrev=False, **given)

    def parse_args(
        self, args: Any = None, namespace: Any = None, training: Sequence[str] = ()
    ) -> Any:
        """The options of this parser, or of the one of a target.

        `training` are the words behind `--`, for the trainer.

        Raises:
          UserError: an unknown flag, which is explained, a wrong value, a flag with
            several values, or a flag of this parser in `training`.
        """
        options, unknown = self.parse_known_args(args, namespace)
        reader = self
        if self._subparsers:
            reader = self._subparsers._group_actions[0].choices[options.target]
        words = sys.argv[1:] if args is None else args
        if lines := repeats(reader._given(words), reader._types()):
            self.error("; ".join(lines))
        known = [name.lstrip("-") for name in reader._option_string_actions]
        refused = [_explain(word, unknown[i:], known) for i, word in enumerate(unknown)]
        if any(refused):
            self.error("; ".join(filter(None, refused)))
        if unknown:
            how = f"write {self._main_flag}={unknown[0]}" if self._main_flag else ""
            how = how or "flags start with --"
            self.error(f"unexpected argument {unknown[0]!r}; {how}")
        late = [
            f"{' '.join(flag.words)} is a flag of {self.prog.split()[-1]}: write it "
            "before --"
            for flag in given_flags(training, NoFlags, flat(Config()))
            if flag.name.replace("_", "-") in {*known} - {"", "h", "help"}
        ]
        if late:
            self.error("; ".join(late))
        return options

    def _given(self, words: Sequence[str]) -> Iterator[GivenFlag]:
        """The flags of this parser among `words`, in the order of the command line."""
        rest = iter(words)
        for word in rest:
            name, equals, value = word.partition("=")
            if action := self._option_string_actions.get(name):
                if not equals:
                    value = "True" if action.nargs == 0 else next(rest, "")
                yield GivenFlag(name.lstrip("-"), value, (word,), is_known=True)

    def _types(self) -> dict[str, Any]:
        """The type of each flag, as `repeats` takes them."""
        kinds = {expanded: Path, None: str}
        return {
            name.lstrip("-"): tuple[str, ...]
            if isinstance(action.default, list)
            else kinds.get(action.type, type(action.default))
            for name, action in self._option_string_actions.items()
        }

    def error(self, message: str) -> None:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = nearest(wrong[1], re.findall(r"[\w.-]+", wrong[2])) if wrong else ""
        raise UserError(f"{message}{near}; see {self.prog} --help")


def _explain(word: str, rest: Sequence[str], flags: Sequence[str]) -> str:
    """The sentence about an unknown flag, or "" for a word that is none.

    `rest`: this word and those behind it, of which the next may be its value.
    """
    name, equals, value = word.lstrip("-").partition("=")
    if not (word.startswith("-") or equals) or not name:
        return ""
    given = value if equals else next(iter(rest[1:]), None)
    if name == "config" or name.startswith("config."):
        return f"{word} is a flag of research.train: write it after --"
    said = explain_flag(name, flags, flat(Config()), given, "after --")
    return f"{word.partition('=')[0]}{said}"


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits at the first `--` into the launcher's flags and the trainer's flags."""
    own = list(arguments)
    middle = own.index("--") if "--" in own else len(own)
    return own[:middle], own[middle + 1 :]


def at_least(least: int) -> Callable[[str], int]:
    """The type of an integer flag with a lower bound."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    read.__name__ = "int"  # Argparse names it in the error for a text like "two".
    return read


def add_text(
    parser: argparse.ArgumentParser, name: str, help: str, default: str = ""
) -> None:
    parser.add_argument(name, default=default, help=help)


def add_path(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    """Adds a flag that names a file or folder of this machine."""
    parser.add_argument(name, type=expanded, default="", help=help)


def add_texts(
    parser: argparse.ArgumentParser, name: str, metavar: str, help: str
) -> None:
    """Adds a flag that may be repeated."""
    parser.add_argument(name, action="append", default=[], metavar=metavar, help=help)


def add_number(
    parser: argparse.ArgumentParser, name: str, help: str, default: int, least: int
) -> None:
    parser.add_argument(name, type=at_least(least), default=default, help=help)


def add_switch(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    parser.add_argument(name, action="store_true", help=help)


def add_restarts(parser: argparse.ArgumentParser, default: int = 3) -> None:
    help = f"restart a failed trainer this many times; default: {default}"
    add_number(parser, "--restarts", help, default, least=0)


def add_grace(parser: argparse.ArgumentParser) -> None:
    help = "seconds that a preempted trainer has to save; default: 120"
    add_number(parser, "--grace", help, default=120, least=1)
