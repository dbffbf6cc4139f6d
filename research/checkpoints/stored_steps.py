"""Which steps are on disk, and how large a folder is. Imports no JAX, for pages."""

import json
from pathlib import Path

SEAL = "sums.json"  # See `checksums`.


def step_folders(folder: Path) -> list[Path]:
    """The folders of committed steps, oldest first; none if `folder` does not exist."""
    steps = [x for x in folder.glob("*") if _is_step(x.name) and x.is_dir()]
    return sorted(steps, key=lambda x: int(x.name))


def _is_step(name: str) -> bool:
    """Whether it is a step as a save writes it: 7, not 007 or digits of other scripts.

    Whoever has the number finds the folder by it.
    """
    return name.isdecimal() and str(int(name)) == name


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`, roughly if it is being changed."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def seal_of(folder: Path) -> str:
    """The sum of all checksums of a sealed folder, which stands for all its bytes.

    Empty where there is no seal that can be read.
    """
    try:
        return str(json.loads((folder / SEAL).read_bytes())["sum"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
