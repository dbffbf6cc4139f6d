"""Trains, tests and deploys in a browser: `python -m research.studio`."""

import dataclasses
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import knob

USAGE = """
python -m research.studio [--runs=runs] [--data=data] [--port=8700]

Prints an address; open it in a browser. The page shows the run directories below
--runs, also those that were started by hand, and the files below --data; it reads and
writes nothing outside of them. A training that it starts is a process of its own: to
close the browser, or to end the studio, changes nothing. See docs/studio.md.
"""


@dataclasses.dataclass(frozen=True)
class StudioFlags:
    """The flags of `python -m research.studio`."""

    runs: tuple[str, ...] = knob(
        ("runs",), "folder of run directories; may be repeated", is_path=True
    )
    data: tuple[str, ...] = knob(
        ("data",), "folder of data files; may be repeated", is_path=True
    )
    host: str = knob("127.0.0.1", "address; another one needs --key_file")
    name: tuple[str, ...] = knob(
        (), "host name of its address, as of a proxy in front; may be repeated"
    )
    port: int = knob(8700, "port; 0 takes any free one", low=0, high=65535)
    key_file: str = knob(
        "",
        "file of keys that serve as tokens, one a line; `admin KEY` may also start, "
        "stop and remove",
        is_path=True,
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    argv = [word.replace("--key-file", "--key_file", 1) for word in argv]
    flags = command_line.parse(argv, USAGE, StudioFlags)
    # Imported late: importing all pages takes longer than printing the flags.
    from research.studio.open_studio import open_studio

    open_studio(**dataclasses.asdict(flags))
    return 0


if __name__ == "__main__":
    command_line.run(main)
