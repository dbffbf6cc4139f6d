"""The Hugging Face hub: addresses, and the revisions that they stand for.

An address is `hub://owner/name[@revision]`; one of a dataset may also name a subset and
a split: `hub://owner/name[@revision][:subset[@split]]`. Nothing else parses them.
"""

import dataclasses
import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from research.core.errors import UserError

PREFIX = "hub://"
ADDRESS = re.compile(
    r"hub://(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?"
    r"(?:(?P<rows>:)(?P<subset>[^@]*)(?:@(?P<split>.+))?)?"
)
# The addresses of pages and files of the hub, and what looks like one of ours.
PAGE = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://"
    r"|hub:/(?:/(?=datasets/|models/)|(?!/)))"
    r"(?:(?P<kind>datasets|models|spaces)/)?"
    r"(?P<name>[\w.-]+(?:/(?!(?:tree|blob|resolve|viewer)\b)[\w.-]+)?)"
    r"(?:@(?P<at>[\w.-]+))?"
    r"(?:/(?P<view>tree|blob|resolve|viewer)(?:/(?P<of>[^/?#]+))?)?"
    r"(?:/(?P<rest>[^?#:]+?))?"
    r"/?(?:[?#].*)?"
)
COMMIT = re.compile("[0-9a-f]{40}")
# Weights that some repositories hold a second time, in a format of their own.
OTHER_COPIES = ["consolidated*", "original/*"]


def is_hub(where: str) -> bool:
    """Whether `where` names something on the hub."""
    return where.startswith(PREFIX)


def how_on_hub(written: str, kind: str) -> str:
    """How `written`, which is no file here, is written if it is on the hub.

    A name that ends as a file does is taken for a file, and gets the general form.
    """
    rows = "[:subset[@split]]" if kind == "dataset" else ""
    is_name = "/" in written and ADDRESS.fullmatch(PREFIX + written)
    ends_as_file = re.search(r"\.[A-Za-z]\w*$", written)
    name = written if is_name and not ends_as_file else f"owner/name[@revision]{rows}"
    return f"a {kind} on the hub is written {PREFIX}{name}"


def how_from_page(written: str, kind: str) -> str:
    """Tells how to use what a page or file of the hub has; "" for other text.

    `kind`: `dataset` or `model` where a `hub://` address of one may stand, else "".
    """
    found = PAGE.fullmatch(written)
    if not found:
        return ""
    own = {"datasets": "dataset", "spaces": "space"}.get(found["kind"], "model")
    if written.startswith("hub:") and not found["kind"]:
        own = kind or own
    viewed = found["of"] if found["view"] == "viewer" else None
    revision = found["at"] or ("" if viewed else found["of"]) or "main"
    rest = "" if found["view"] == "tree" else found["rest"] or ""
    if kind and own != kind:
        return f"it is a {own}, and a {kind} is needed"
    if kind and (viewed or not rest):
        at = "" if revision == "main" else f"@{revision}"
        rows = f":{viewed}" + (f"@{rest}" if rest else "") if viewed else ""
        return f"write {PREFIX}{found['name']}{at}{rows}"
    words = ["hf download", found["name"], "" if viewed else rest]
    words += [f"--repo-type {own}" if own != "model" else ""]
    words += [f"--revision {revision}" if revision != "main" else ""]
    words += ["--local-dir FOLDER"]
    return f"fetch it with {' '.join(filter(None, words))}, and give the path"


@dataclasses.dataclass(frozen=True)
class HubAddress:
    """A repository on the hub, or rows of a dataset there.

    Attributes:
      name: `owner/name`.
      kind: `model` or `dataset`.
      revision: a branch, tag or commit; "" for the main branch.
      subset: of a dataset; "" for its only one.
      split: of a dataset; "" for `train`.
    """

    name: str
    kind: str
    revision: str = ""
    subset: str = ""
    split: str = ""

    @classmethod
    def parse(cls, where: str, kind: str) -> "HubAddress":
        """Raises UserError: `where` is no address of a repository of this kind."""
        found = ADDRESS.fullmatch(where)
        if not found or (kind == "model" and found["rows"]):
            rows = "[:subset[@split]]" if kind == "dataset" else ""
            form = f"write hub://owner/name[@revision]{rows}"
            raise UserError(
                f"{where} is no {kind} on the hub; {how_from_page(where, kind) or form}"
            )
        parts = {k: v or "" for k, v in found.groupdict().items() if k != "rows"}
        return cls(kind=kind, **parts)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        split = f"@{self.split}" if self.split else ""
        rows = f":{self.subset}{split}" if self.subset or split else ""
        return f"{PREFIX}{self.name}{revision}{rows}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(COMMIT.fullmatch(self.revision))


@dataclasses.dataclass(frozen=True)
class HubReply:
    """The hub's reply about a name.

    Attributes:
      revision: the commit that the name stands for; "" if the hub did not know the
        name or did not reply.
      reason: why there is no revision, in one line; unread where there is one.
    """

    revision: str
    reason: str


def resolve(address: HubAddress, timeout: float) -> HubReply:
    """The commit that an address stands for, from the hub or from its local cache.

    A pinned address stands for itself. A model that is in the cache is not asked for.
    """
    if address.is_pinned:
        return HubReply(address.revision, "")
    known = cached_commit(address)
    if address.kind == "model" and known:
        return HubReply(known, "")
    reply = ask_hub(address, timeout)
    return reply if reply.revision else HubReply(known, reply.reason)


def require_commit(address: HubAddress, what: str, timeout: float) -> str:
    """The commit from `resolve`. Raises UserError: there is none; names `what`."""
    reply = resolve(address, timeout)
    if reply.revision:
        return reply.revision
    hint = ""
    if address.kind == "dataset" and address.revision:
        hint = f"; a split is written {PREFIX}{address.name}:@{address.revision}"
    raise UserError(
        f"{what} is out of reach ({reply.reason}), and the local cache lacks it; check "
        "its name and revision, give a local file or folder, or more time with "
        f"--config.data.hub_timeout={hint}"
    )


def fetch_files(
    address: HubAddress,
    timeout: float,
    patterns: Sequence[str],
    lacking: Callable[[Path], str],
) -> Path:
    """The folder with files of a model: in the local cache, or downloaded there.

    Args:
      address: of a model.
      timeout: seconds after which the hub counts as out of reach.
      patterns: names of the files, such as `*.json`.
      lacking: what a folder of the cache lacks, in a word, or ""; an earlier command
        may have fetched only some of the files.

    Raises:
      ConnectionError: the cache lacks them, and the hub does not give them.
    """
    import huggingface_hub

    reply = resolve(address, timeout)
    if not reply.revision:
        raise ConnectionError(reply.reason)

    def fetch(local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                address.name,
                revision=reply.revision,
                allow_patterns=list(patterns),
                ignore_patterns=OTHER_COPIES,
                local_files_only=local_files_only,
            )
        )

    try:
        folder = fetch(local_files_only=True)
        if not (lack := lacking(folder)):
            logging.info("hub: %s found in the local cache", address)
            return folder
    except Exception as error:
        lack = f"files of it ({error})"
    if not (asked := ask_hub(address, timeout)).revision:
        raise ConnectionError(
            f"the local cache lacks {lack}, and the hub is out of reach: {asked.reason}"
        )
    try:
        return fetch(local_files_only=False)
    except Exception as error:  # The hub's client raises a dozen unrelated kinds.
        raise ConnectionError(str(error)) from error


def cached_commit(address: HubAddress) -> str:
    """The commit of an address when it was last downloaded, or ""."""
    from huggingface_hub import constants, file_download

    if address.is_pinned:
        return address.revision
    folder = file_download.repo_folder_name(
        repo_id=address.name, repo_type=address.kind
    )
    file = Path(constants.HF_HUB_CACHE, folder, "refs", address.revision or "main")
    try:
        commit = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return commit if COMMIT.fullmatch(commit) else ""


def ask_hub(address: HubAddress, timeout: float) -> HubReply:
    """Asks for the commit of a repository, with a time limit.

    The hub's own client retries for minutes.

    Args:
      address: the repository and its branch or tag.
      timeout: seconds after which the hub counts as out of reach.
    """
    import huggingface_hub

    replies: list[HubReply] = []

    def ask() -> None:
        try:
            info = huggingface_hub.HfApi().repo_info(
                address.name,
                repo_type=address.kind,
                revision=address.revision or None,
                timeout=timeout,
            )
            replies.append(HubReply(info.sha or "", "it names no commit"))
        except Exception as error:  # The hub's client raises a dozen unrelated kinds.
            first_line = str(error).partition("\n")[0]
            logging.info("hub: out of reach (%s)", first_line)
            replies.append(HubReply("", first_line or type(error).__name__))

    # In a thread, because looking up a host name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return replies[0] if replies else HubReply("", f"no reply in {timeout:g} seconds")
