"""A command that must be refused, and what it must say."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Flags, what the message must name, and what has to be there first."""

    flags: tuple[str, ...]
    names: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()
    prepare: str = ""
    devices: int = 1
    command: str = "train"
