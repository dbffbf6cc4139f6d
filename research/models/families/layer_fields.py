"""Which layers have a window, in a Hugging Face `config.json`."""

from collections.abc import Callable, Iterable
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.rope_fields import FULL, SLIDING


def read_window(
    fields: ConfigFields, layers: int, slides: Callable[[int], bool]
) -> dict[str, Any]:
    """The switches `window` and `window_layers`.

    Args:
      fields: the whole file. `sliding_window` absent or null means no window.
      layers: their number.
      slides: whether a layer of this number has the window, where the file has no
        `layer_types`.

    Raises:
      UserError: a field is malformed, or names a kind of layer that is not computed.
    """
    if fields.get("sliding_window") is None:
        return {}
    kinds = fields.get("layer_types")
    if kinds is None:
        chosen = tuple(filter(slides, range(layers)))
    else:
        known = isinstance(kinds, list) and {*map(str, kinds)} <= {FULL, SLIDING}
        if not known or len(kinds) < layers:
            right = f"{layers} times {FULL} or {SLIDING}"
            raise fields.wrong("layer_types", kinds, right)
        chosen = tuple(n for n in range(layers) if kinds[n] == SLIDING)
    window = fields.integer("sliding_window")
    return {"window": window, "window_layers": chosen} if chosen else {}


def layer_types(a: Architecture) -> list[str]:
    """`layer_types` of this model."""
    return kinds_of_layers(a.windows)


def kinds_of_layers(slides: Iterable[object]) -> list[str]:
    """`layer_types` of layers that have a window where `slides` is true."""
    return [SLIDING if window else FULL for window in slides]
