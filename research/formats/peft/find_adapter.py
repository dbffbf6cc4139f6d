"""Where an adapter of PEFT lies: a folder, or a repository on the hub."""

from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.hub_access import HubAddress, fetch_files, is_hub
from research.core.local_paths import expanded, holds_adapter, local_path, no_such
from research.formats.peft.adapter_config import CONFIG, PICKLED, REMEDY, TENSORS

# Files beside an adapter that say how its prompts are written.
PROMPTS = ("tokenizer*.json", "special_tokens_map.json", "*.jinja")


def names_adapter(written: str) -> bool:
    """Whether a user who names a run has named an adapter of PEFT: its folder, or hub://.

    No run is on the hub.
    """
    return is_hub(written) or holds_adapter(Path(expanded(written)))


def find_adapter(name: str, hub_timeout: float = 5.0) -> Path:
    """The folder of an adapter, with both of its files.

    Args:
      name: a folder, or `hub://owner/name[@revision]`.
      hub_timeout: seconds after which the hub counts as out of reach.

    Raises:
      UserError: it is absent, or has tensors only in a pickled file.
    """
    if is_hub(name):
        folder = _from_hub(name, hub_timeout)
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"{name} is no adapter, because it has no {CONFIG}; a whole model is "
                "given as --model, or as --config.model.init_from"
            )
    else:
        folder = local_path(name, "config.lora.init_from")
    if not folder.exists():
        raise no_such(f"adapter {name!r}", folder, REMEDY)
    if not (folder / CONFIG).is_file():
        inside = sorted(str(x.parent) for x in folder.glob(f"*/{CONFIG}"))
        there = f"; there are {', '.join(inside[:8])}" if inside else ""
        raise UserError(f"{folder} has no {CONFIG}: {REMEDY}{there}")
    if not (folder / TENSORS).is_file():
        if (folder / PICKLED).exists():
            raise UserError(
                f"{folder} has {PICKLED} alone, which is pickled and never read: load "
                "it with PEFT and save it again, which writes safetensors"
            )
        raise UserError(f"{folder} has no {TENSORS}: {REMEDY}")
    return folder


def open_tensors(file: Path) -> Any:
    """Opens a safetensors file. Raises UserError: it is damaged."""
    from safetensors import safe_open

    try:
        return safe_open(file, framework="numpy")
    except Exception as error:  # SafetensorError, or an error of mmap.
        raise UserError(f"{file} is not a safetensors file: {error}") from error


def _from_hub(name: str, timeout: float) -> Path:
    """The folder of the local cache with both files, or what is there of them."""

    def lacking(folder: Path) -> str:
        both = (folder / CONFIG).is_file() and (folder / TENSORS).is_file()
        return "" if both else "the adapter"

    address = HubAddress.parse(name, "model")
    try:
        return fetch_files(address, timeout, (CONFIG, TENSORS, *PROMPTS), lacking)
    except ConnectionError as error:
        raise UserError(
            f"adapter {name} cannot be fetched ({error}); check the name, the revision "
            "and the network, or give a local folder"
        ) from error
