"""The flag parser of every launch command, and the flags that several targets share."""

import argparse
from collections.abc import Callable

from research.core.errors import UserError


class LaunchParser(argparse.ArgumentParser):
    """Argparse whose errors are one line, as those of all other commands."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an integer flag with a lower bound."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    read.__name__ = "int"  # Argparse names it in the error for a text like "two".
    return read


def add_restarts(parser: argparse.ArgumentParser, default: int = 3) -> None:
    """Adds `--restarts`."""
    parser.add_argument(
        "--restarts",
        type=at_least(0),
        default=default,
        help=f"restart a failed trainer this many times; default: {default}",
    )


def add_grace(parser: argparse.ArgumentParser) -> None:
    """Adds `--grace`."""
    parser.add_argument(
        "--grace",
        type=at_least(1),
        default=120,
        help="seconds that a preempted trainer has to save; default: 120",
    )
