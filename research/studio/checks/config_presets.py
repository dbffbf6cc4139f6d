"""The config files that come with the code."""

import ast
from pathlib import Path

from research.studio.roots import shown_paths

FOLDER = Path(__file__).parents[3] / "configs"
FIRST = "finetune_dolly.py"


def first_preset() -> str:
    """The one for a first run on any machine, as a path that `--config` takes."""
    return shown_paths([FOLDER / FIRST])[0]


def presets() -> dict[str, str]:
    """The first line of each config file by its path; the first preset is first."""
    files = sorted(FOLDER.glob("*.py"), key=lambda p: (p.name != FIRST, p.name))
    return {
        shown_paths([file])[0]: said.partition("\n")[0]
        for file in files
        if (said := ast.get_docstring(ast.parse(file.read_text())) or "")
        and file.name != "__init__.py"
    }
