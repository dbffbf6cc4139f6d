"""The files of research/ and launch/, for tests that read source code."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, LAUNCHER = ROOT / "research", ROOT / "launch"


def files_of(folder):
    return sorted(f for f in folder.rglob("*.py") if f.name != "__init__.py")


def dotted(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


FILES = files_of(PACKAGE)
