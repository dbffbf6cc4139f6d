"""The folder for files that can be made again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`research` in the user's cache folder. The folder may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "research"
