"""The provenance of a start: code version, command, packages, environment."""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Set by a launcher that ships the code without its repository.
CODE_VERSION = "RESEARCH_CODE_VERSION"
PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("transformers", "tokenizers", "datasets", "grain", "safetensors"),
)
# Variables that decide how a program computes and hold no secret.
SHOWN = re.compile(
    r"JAX_\w+|XLA_\w+|LIBTPU_INIT_ARGS|TPU_PREMAPPED_BUFFER_SIZE|NCCL_\w+|"
    r"GLIBC_TUNABLES|CUDA_VISIBLE_DEVICES|"
    r"SLURM_(JOB_ID|JOB_NODELIST|NTASKS|RESTART_COUNT)"
)
# All processes of a run need the same of these: they change numbers or collectives.
COMPUTES = (
    *("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION"),
    *("JAX_DISABLE_JIT", "JAX_DISABLE_MOST_OPTIMIZATIONS", "NVIDIA_TF32_OVERRIDE"),
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY\b")
ROOT = Path(__file__).parents[2]


def describe(
    environment: Mapping[str, str] = os.environ, root: Path = ROOT
) -> dict[str, Any]:
    """Describes this process for `run.json`.

    Returns:
      JSON values `code`, `command`, `python`, `packages`, `environment`, and `secrets`:
      the names of variables that look like secrets, without their values.
    """
    return {
        "code": environment.get(CODE_VERSION) or code_version(root),
        "command": sys.orig_argv[1:],
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "environment": {
            name: value
            for name, value in sorted(environment.items())
            if SHOWN.fullmatch(name) and not SECRET.search(name)
        },
        "secrets": sorted(name for name in environment if SECRET.search(name)),
    }


def code_version(root: Path) -> str:
    """The commit of `root`, with `-dirty` if tracked files differ from it.

    Returns `unknown` if `root` is not a repository, or git is missing.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"  # This repository only contains the installed package.
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def shared_parts(root: Path = ROOT, code: tuple[str, ...] = ("",)) -> dict[str, str]:
    """The facts that the processes of one run share if they compute the same.

    Args:
      root: of the code.
      code: beginnings of the paths below `research/` that count; by default all.

    Returns:
      Python, the packages, the sha256 of our own source files, and that of each
      variable of the environment that changes how a program computes.
    """
    digest = hashlib.sha256()
    for path in sorted((root / "research").rglob("*.py")):
        if path.relative_to(root / "research").as_posix().startswith(code):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    found = {
        "python": sys.version.partition(" ")[0],
        "code version": digest.hexdigest(),
    }
    found |= {
        f"environment {name}": "sha256 "
        + hashlib.sha256(os.fsencode(value)).hexdigest()
        for name, value in ((x, os.environ.get(x, "")) for x in COMPUTES)
        if value
    }
    return found | {f"package {name}": str(_version(name)) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
