"""The table of adapter kinds, by the names that `config.lora.kind` takes."""

from research.core.errors import UserError, nearest
from research.weights.adapters.adapter_kind import AdapterKind
from research.weights.adapters.lora import LORA

KINDS: dict[str, AdapterKind] = {kind.name: kind for kind in (LORA,)}


def find_kind(name: str) -> AdapterKind:
    """The adapter kind of that name.

    Raises:
      UserError: no kind has the name; the message lists those that exist.
    """
    if name not in KINDS:
        raise UserError(
            f"config.lora.kind is {name!r}; it must be one of {', '.join(KINDS)}"
            f"{nearest(name, KINDS)}"
        )
    return KINDS[name]
