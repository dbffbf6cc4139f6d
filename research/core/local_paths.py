"""Paths that a user writes: `~` is the home folder, and an address is no path."""

import itertools
import os
import re
import shlex
from pathlib import Path, PurePosixPath

from research.core.errors import UserError, closest
from research.core.hub_access import how_from_page

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# How files come from an address to this machine, by its scheme.
FETCHED = {
    "file": "write the path alone",
    "pkg": "only a model can be in a package",
    "gs": "mount the bucket with gcsfuse, or copy the files with gcloud storage cp -r "
    "{} FOLDER, and give the path",
    "s3": "mount the bucket with mount-s3, or copy the files with aws s3 cp "
    "--recursive {} FOLDER, and give the path",
}
GITHUB = re.compile(
    r"https?://(?:www\.)?github\.com/(?P<project>[\w.-]+/[\w.-]+)"
    r"(?:/blob/(?P<file>[^?#]+))?"
)
ADAPTER_FILE = "adapter_config.json"  # Every adapter folder of PEFT has it.
LISTED = 10_000  # names in a folder among which a near one is searched
STEP = re.compile(r"(?P<run>.+)@(?P<step>latest|best|[0-9]+)")


def split_step(written: str) -> tuple[str, str]:
    """The folder of a run and the step in `RUN@STEP`; "" where no step is named.

    An address, and a path that exists as it is written, name no step.
    """
    found = STEP.fullmatch(written)
    known = os.path.exists(os.path.expanduser(written))
    if not found or known or ADDRESS.match(written):
        return written, ""
    return found["run"], found["step"]


# A path, or each of several with commas between them.
FIRST_PARTS = re.compile(r"(^\s*|,\s*)(~[^/,]*)")


def expanded(written: str) -> str:
    """`written`, where a `~` that begins a path is the home folder.

    All knobs and flags that take paths pass through here. Addresses, words and the home
    of an unknown user stay as they are.
    """
    return FIRST_PARTS.sub(lambda x: x[1] + os.path.expanduser(x[2]), written)


def listed_paths(written: str, folder: Path = Path()) -> list[str]:
    """The paths of a knob that takes one, or several with commas between them.

    One whose name has a comma, and that is there below `folder`, is one path.
    """
    if "," not in written or os.path.exists(folder / expanded(written)):
        return [written]
    return [part.strip() for part in written.split(",")]


def local_path(written: str | Path, name: str = "a path", hub: str = "") -> Path:
    """The path of a file or folder on this machine.

    Args:
      written: by the user.
      name: of the knob or flag, for messages.
      hub: what the knob takes from the hub instead: a model, a dataset, or nothing.

    Raises:
      UserError: it is an address such as `gs://bucket/folder`, or the home folder of an
        unknown user.
    """
    text = str(written)
    page = "" if os.path.exists(text) else how_from_page(text, hub)
    if page or ADDRESS.match(text):
        raise UserError(
            f"{name} is {text}, an address and no path of this machine; "
            f"{page or _how_fetched(text)}"
        )
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name} is {written}: {error}") from error


def _how_fetched(address: str) -> str:
    """How to get the files of an address that is not on the Hugging Face hub."""
    scheme = address.partition("://")[0].lower()
    if found := GITHUB.match(address):
        page = f"https://github.com/{found['project']}"
        file = shlex.quote(f"{page}/raw/{found['file']}")
        how = f"curl -LO {file}" if found["file"] else f"git clone {page}"
        return f"fetch it with {how}, and give the path"
    if scheme in ("http", "https"):
        how = f"curl -LO {shlex.quote(address)}"
        return f"download the files (one with {how}), and give the path"
    other = "mount the storage, or copy the files, and give the path"
    return FETCHED.get(scheme, other).format(address)


def holds_run(folder: Path) -> bool:
    """Whether it is a run directory: its files change, and are nobody's data."""
    return (folder / "config.json").is_file() and (folder / "identity.json").is_file()


def holds_adapter(folder: Path) -> bool:
    """Whether it is an adapter folder of PEFT, and no run directory."""
    return os.path.isfile(folder / ADAPTER_FILE) and not holds_run(folder)


def no_such(what: str, path: Path, remedy: str = "check its path") -> UserError:
    """The error that nothing is at `path`, which `what` names; suggests a near name."""
    near = _nearest(path)
    said = f" (did you mean {str(near)!r}?)" if near else ""
    return UserError(f"{what} does not exist{said}; {remedy}")


def require_file(what: str, path: Path) -> None:
    """Raises UserError: no file is at `path`, which `what` names."""
    if not path.exists():
        raise no_such(what, path)
    if not path.is_file():
        raise UserError(f"{what} is no file")


def _nearest(path: Path) -> Path | None:
    """The path with its first missing part replaced by the name most like it."""
    for place in (*reversed(path.parents), path):
        if os.path.lexists(place):
            continue
        try:
            with os.scandir(place.parent) as entries:
                names = [entry.name for entry in itertools.islice(entries, LISTED)]
        except OSError:
            return None
        near = place.with_name(closest(place.name, names) or place.name)
        whole = near / path.relative_to(place)
        return None if near == place else whole if whole.exists() else near
    return None


def public_name(where: str) -> str:
    """An address as it is; of a path only the last part."""
    return where if "://" in where else PurePosixPath(where.strip()).name or where
