"""What a start of a run was made of: code, command, packages, environment."""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Set by whoever ships the code without its repository, as `launch` does.
CODE_VERSION = "RESEARCH_CODE_VERSION"
PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("transformers", "tokenizers", "datasets", "grain", "safetensors"),
)
# Variables whose values decide how a program computes, and hold no secret.
SHOWN = re.compile(
    r"JAX_\w+|XLA_\w+|LIBTPU_INIT_ARGS|TPU_PREMAPPED_BUFFER_SIZE|NCCL_\w+|"
    r"GLIBC_TUNABLES|CUDA_VISIBLE_DEVICES|"
    r"SLURM_(JOB_ID|JOB_NODELIST|NTASKS|RESTART_COUNT)"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY\b")
ROOT = Path(__file__).parents[2]


def describe(
    environment: Mapping[str, str] = os.environ, root: Path = ROOT
) -> dict[str, Any]:
    """JSON-able: `code`, `command`, `python`, `packages`, `environment`, `secrets`.

    Of variables that look like secrets only the names are told.
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
    """The commit that `root` is checked out at, `-dirty` where files differ from it.

    `unknown` where there is no repository, or no git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"  # A repository around an installed package.
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
