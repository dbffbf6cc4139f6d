"""`--help` of every command is quick: it imports nothing that takes long."""

import subprocess
import sys

import pytest
from source_files import LAUNCHER, PACKAGE, ROOT

# Each takes a tenth of a second or more; the limit for all of `--help` is one second.
HEAVY = {
    "jax", "flax", "optax", "orbax", "transformers", "tokenizers", "datasets", "numpy",
    "pyarrow", "scipy", "matplotlib", "starlette", "uvicorn", "httpx", "rich",
}  # fmt: skip
DOORS = [
    ".".join(file.relative_to(ROOT).parent.parts)
    for top in (PACKAGE, LAUNCHER)
    for file in sorted(top.rglob("__main__.py"))
]
PROGRAM = """
import runpy, sys
door, sys.argv = sys.argv[1], [sys.argv[1], "--help"]
try:
    runpy.run_module(door, run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("door", DOORS)
def test_help_imports_nothing_that_takes_long(door):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, door], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said, _, imported = done.stdout.rpartition("imported: ")
    assert f"python -m {door}" in said
    assert not HEAVY & {*imported.split()}
