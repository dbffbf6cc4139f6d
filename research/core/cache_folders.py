"""The folder for files that can be made again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`research` in the user's cache folder. The folder may not exist yet.

    Raises:
      FileNotFoundError: the user has no home folder, as in some containers.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder") from error
    return Path(home) / "research"
