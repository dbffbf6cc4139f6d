"""The owner of one promise: a path that a command names lies below the roots."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from research.config.choices import EMBEDDED
from research.config.field_names import name_sources
from research.config.knobs import fields, map_paths
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.hub_access import PREFIX
from research.core.local_paths import listed_paths, local_path, split_step
from research.studio.listing.run_index import is_run
from research.studio.page_errors import PageError
from research.studio.roots import Roots

HUB = f"{PREFIX}.*"
PACKAGE = r"pkg://[\w.]+(/(?!\.\.?(/|$))[^/]+)+"
# Values that name no path of this machine, by knob.
NO_PATH = {
    "model.init_from": f"{HUB}|{PACKAGE}",
    "lora.init_from": HUB,
    "data.path": f"{HUB}|{EMBEDDED}",
    "data.eval_path": HUB,
    "text.sources": f"{HUB}|stdlib",
    "text.tokenizer": f"{HUB}|byte|bpe:.*",
    "text.cache_dir": "auto",
    "runtime.compilation_cache": "auto",
}
SEVERAL = ("data.path", "data.eval_path")  # They take paths between commas.
WRITTEN = ("run_dir", "text.cache_dir", "runtime.compilation_cache")


class Confinement:
    """Checks paths against the roots of a studio, before a command gets them."""

    def __init__(self, runs: Roots, data: Roots):
        self._runs = runs
        both = (*runs.folders.values(), *data.folders.values())
        self._both = Roots([*map(str, both)], "--runs and --data")

    def check_config(self, config: Config, folder: Path | None = None) -> Path:
        """The folder of the run that a config makes.

        Args:
          config: all of its paths are checked.
          folder: of a sweep, in place of the config's own.

        Raises:
          UserError: a path is none of this machine; or the run would lie in another
            run, or where the studio keeps its own files.
          PageError: a path leads out of the roots.
        """
        own = folder or local_path(config.run_dir, "config.run_dir").absolute()
        for knob, _, value in fields(config):
            self.check_knob(knob, str(own) if knob == "run_dir" else value, own)
        return own

    def check_knob(self, knob: str, value: Any, own: Path) -> None:
        """Checks the paths in the value of a knob of the run or sweep in `own`.

        Raises what `check_config` raises.
        """

        def check(written: str) -> str:
            for part in listed_paths(written) if knob in SEVERAL else [written]:
                if part and not re.fullmatch(NO_PATH.get(knob, "(?!)"), part):
                    if knob in WRITTEN:
                        self.check_written(f"config.{knob}", part, own)
                    else:
                        self.check_read(f"config.{knob}", part)
            return written

        map_paths(FIELDS[knob], value, check)

    def check_data(self, name: str, written: str) -> None:
        """Checks rows or texts, several between commas, with or without names.

        Raises what `check_read` raises.
        """
        for source in name_sources(written) if written else ():
            where = source.partition("=")[2]
            if not re.fullmatch(NO_PATH["data.path"], where):
                self.check_read(name, where)

    def check_read(self, name: str, written: str) -> Path:
        """The path of what a command reads: no file in it may lead out of the roots.

        Args:
          name: of the knob or flag, for messages.
          written: a file, a folder, a pattern, or a checkpoint as RUN@STEP.

        Raises:
          UserError: it is no path of this machine, or one of the studio's own files.
          PageError: it, or a link in it, leads out of the roots.
        """
        path = local_path(split_step(written)[0], name).absolute()
        self._require(self._both, name, path)
        is_pattern = glob.has_magic(str(path)) and not path.exists()
        for found in glob.glob(str(path), recursive=True) if is_pattern else [path]:
            for link in _links_in(Path(found)):
                self._require(self._both, name, link)
        return path

    def check_run(self, name: str, written: str) -> Path:
        """The folder of a run, or of runs, below `--runs`, as results go there.

        Raises what `check_read` raises.
        """
        path = self.check_read(name, written)
        self._require(self._runs, name, path)
        return path

    def check_written(self, name: str, written: str, own: Path) -> None:
        """Checks a folder that a command writes; `own` is that of its run or sweep.

        Raises:
          UserError: it is a root, in another run, or among the studio's own files.
          PageError: it leads out of `--runs`.
        """
        path = local_path(written, name).absolute()
        self._require(self._runs, name, path)
        real, roots = path.resolve(), self._runs.folders.values()
        if real in roots and not is_run(real):
            raise UserError(f"{name}={path} holds all runs: name a folder in it")
        for folder in (real, *real.parents):
            if folder != own.resolve() and is_run(folder):
                raise UserError(
                    f"{name}={path} lies in the run {folder}: choose a folder beside it"
                )
            if folder in roots:
                return

    def _require(self, roots: Roots, name: str, path: Path) -> None:
        try:
            roots.require_inside(path)
            below = [roots.name(place) for place in (path, path.resolve())]
        except PageError as error:
            raise PageError(
                error.status,
                f"{name}: {error}; --runs and --data of the studio may be repeated to "
                "show more folders",
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{name}={str(path)!r} is no path: {error}") from error
        parts = (part for place in below for part in place.split("/")[1:])
        if hidden := next((part for part in parts if part.startswith(".")), None):
            raise UserError(
                f"{name}={path}: {hidden} begins with a dot, as the studio's own "
                "folders do: choose another name"
            )


FIELDS = {path: field for path, field, _ in fields(Config())}


def _links_in(place: Path) -> Iterator[Path]:
    """`place` and the links below it, also below linked folders; none is hidden."""
    waiting, seen = [place], set()
    while waiting:
        top = waiting.pop()
        yield top
        for at, folders, files in os.walk(top):
            if (real := os.path.realpath(at)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in (*folders, *files):
                path = Path(at, name)
                if path.is_symlink() and not name.startswith("."):
                    yield path
                    waiting += [path] * path.is_dir()
