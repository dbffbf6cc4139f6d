"""The folders that pages may show. Nothing outside of them is read or written."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from research.core.errors import UserError
from research.core.local_paths import local_path
from research.studio.page_errors import PageError, not_found


class Roots:
    """Folders by name. A path below one is written `NAME/below/it`, as in addresses.

    A name is that of the folder, with a number where two folders have the same.
    """

    def __init__(self, folders: Sequence[str], flag: str):
        """Folders that are not there are made. Raises UserError: one cannot be used.

        Args:
          folders: as the user wrote them.
          flag: that names them, for messages.
        """
        self.folders: dict[str, Path] = {}
        for written in folders:
            path = local_path(written, flag)
            try:
                path.mkdir(parents=True, exist_ok=True)
                folder = path.resolve(strict=True)
            except OSError as error:
                raise UserError(f"{flag}={written} cannot be used: {error}") from error
            if folder in self.folders.values():
                continue
            name = plain = folder.name or "root"
            number = 1
            while name in self.folders:
                number += 1
                name = f"{plain}-{number}"
            self.folders[name] = folder

    @property
    def first(self) -> Path:
        """The folder in which new things are made."""
        return next(iter(self.folders.values()))

    def find(self, written: str) -> Path:
        """The existing path of `NAME/below/it`, with no link in it that leads out.

        Raises:
          PageError: 403 it leads out of the folders; 404 there is nothing.
        """
        name, _, below = written.strip("/").partition("/")
        parts = below.split("/") if below else []
        if "\0" in written or ".." in parts or "." in parts or "" in parts:
            raise PageError(403, f"{written!r} is no path of this studio")
        if name not in self.folders:
            raise not_found(
                f"there is no folder {name!r}; the studio shows "
                f"{', '.join(self.folders)}"
            )
        path = self.folders[name].joinpath(*parts)
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise not_found(f"{written} is not there: moved or removed") from error
        if not self._holds(real):
            raise PageError(
                403,
                f"{written} leads out of the folders that this studio shows, to {real}",
            )
        return path

    def name(self, path: Path) -> str:
        """`NAME/below/it` of a path in one of the folders.

        Raises:
          PageError: 403 it is outside of them.
        """
        absolute = Path(os.path.normpath(path.absolute()))
        for name, folder in self.folders.items():
            if absolute.is_relative_to(folder):
                below = absolute.relative_to(folder).as_posix()
                return name if below == "." else f"{name}/{below}"
        raise PageError(
            403,
            f"{path} lies outside of {', '.join(map(str, self.folders.values()))}, the "
            "folders that this studio shows",
        )

    def require_inside(self, path: Path) -> Path:
        """`path`, whose existing part lies in one of the folders. Raises PageError."""
        self.name(path)
        there = path.absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not self._holds(there.resolve()):
            raise PageError(403, f"{path} leads out of the folders of this studio")
        return path

    def _holds(self, real: Path) -> bool:
        return any(real.is_relative_to(folder) for folder in self.folders.values())


def shown_paths(paths: Iterable[Path]) -> list[str]:
    """Paths as people write them here: below the working folder, relative to it."""
    here = Path.cwd()
    return [
        str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
        for path in paths
    ]
