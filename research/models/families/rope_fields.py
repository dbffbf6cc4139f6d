"""The rotary embedding in a Hugging Face `config.json`, in both of its spellings.

Transformers 5 writes `rope_parameters`; older releases write `rope_theta` beside
`rope_scaling`. Where layers differ, `rope_parameters` has an object for each kind.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from research.core.errors import UserError
from research.models.architecture import Architecture, Rope, RopeScaling
from research.models.families.config_fields import ConfigFields

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
FULL, SLIDING = "full_attention", "sliding_attention"
ORIGINAL = "original_max_position_embeddings"


def read_rope(
    fields: ConfigFields,
    head_dim: int,
    *,
    partial: bool = False,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Rope:
    """The one rotary embedding of all layers.

    Args:
      fields: the whole file.
      head_dim: width of a head.
      partial: the family knows embeddings that turn only a part of a head.
      names: of kinds of scaling, by other names that the family has for them.

    Raises:
      UserError: a field is malformed, or asks for a scaling that is not computed.
    """
    rope = fields.group("rope_scaling", "rope_parameters")
    for layers in (FULL, SLIDING):
        rope.only(layers, None)
    for group in (fields, rope):
        if not partial:
            group.only("partial_rotary_factor", 1.0)
    kind = rope.get("rope_type", rope.get("type"))
    if isinstance(kind, str) and kind in names:
        rope = ConfigFields(rope.present() | {"rope_type": names[kind]}, rope.where)
    return _read(fields, rope, head_dim)


def read_ropes(
    fields: ConfigFields, head_dim: int, local_theta: float | None = None
) -> tuple[Rope, Rope]:
    """The rotary embeddings of layers that see all tokens, and of those with a window.

    In the old spelling the scaling is that of layers that see all tokens. Other layers
    have `rope_local_base_freq`, or else `local_theta`, or else the common base.

    Raises:
      UserError: as `read_rope`.
    """
    parameters = fields.group("rope_parameters")
    both = []
    for kind in (FULL, SLIDING):
        own = parameters.group(kind).present()
        if kind == FULL:
            own = fields.group("rope_scaling").present() | own
        elif "rope_theta" not in own:
            base = fields.get("rope_local_base_freq", local_theta)
            own |= {} if base is None else {"rope_theta": base}
        rope = ConfigFields(own, f"{parameters.where}, {kind}")
        rope.only("partial_rotary_factor", 1.0)
        # Transformers reads this one outside of the objects of kinds.
        rope.only("truncate", True)
        both.append(_read(fields, rope, head_dim))
    return both[0], both[1]


def _read(fields: ConfigFields, rope: ConfigFields, head_dim: int) -> Rope:
    outer = fields.number("rope_theta", 10000.0, above=1)
    theta = rope.number("rope_theta", outer, above=1)
    share = "partial_rotary_factor"
    fraction = rope.number(share, fields.number(share, 1.0, high=1), high=1)
    turned = int(head_dim * fraction)
    if turned < 2 or turned % 2:
        raise rope.wrong(
            share, fraction, f"an even share of the {head_dim} numbers of a head"
        )
    return Rope(theta, _read_scaling(fields, rope, turned // 2), fraction)


def _read_scaling(fields: ConfigFields, rope: ConfigFields, half: int) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        why = ", whose frequencies change with the length of a row" * (
            kind == "dynamic"
        )
        raise UserError(
            f"{rope.where}: rope_type is {kind!r}{why}; it must be one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        return RopeScaling()
    # As transformers reads it: outside the object first, then inside.
    longest = fields.integer("max_position_embeddings", 2048)
    original = fields.integer(ORIGINAL, rope.integer(ORIGINAL, longest, low=2), low=2)
    implied = longest / original if kind in ("yarn", "longrope") else None
    factor = rope.number("factor", implied, high=1e6)
    if factor < 1:
        raise rope.wrong("factor", factor, "at least 1")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor)
    common: dict[str, Any] = {"kind": kind, "factor": factor}
    common["original_max_position"] = original
    if kind == "llama3":
        low = rope.number("low_freq_factor")
        # Wavelengths between the two are interpolated, so they must differ.
        high = rope.number("high_freq_factor", above=low)
        return RopeScaling(**common, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return RopeScaling(
            **common,
            attention_factor=rope.number(
                "attention_factor", _temperature(rope, factor)
            ),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            truncate=rope.flag("truncate", True),
        )
    stretch = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        **common,
        attention_factor=rope.number("attention_factor", stretch),
        short=rope.numbers("short_factor", half),
        long=rope.numbers("long_factor", half),
    )


def _temperature(rope: ConfigFields, factor: float) -> float:
    """The factor of cosines and sines: YaRN, eq. 22, or DeepSeek's ratio of two."""

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(rope.number("mscale")) / of(rope.number("mscale_all_dim"))
    return of(1.0)


def write_rope(a: Architecture) -> dict[str, Any]:
    """The fields that `read_rope` reads, in the spellings of both kinds of readers."""
    rope = Rope(a.rope_theta, a.rope_scaling, a.rope_fraction)
    scaling = _write(rope.scaling)
    partial = {}
    if rope.fraction != 1.0:
        partial["partial_rotary_factor"] = rope.fraction
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling.kind == "default" else scaling,
        **partial,
        "rope_parameters": scaling | {"rope_theta": rope.theta} | partial,
    }


def write_ropes(a: Architecture) -> dict[str, Any]:
    """The fields that `read_ropes` reads, in both spellings."""
    full = Rope(a.rope_theta, a.rope_scaling)
    parameters = {
        kind: _write(rope.scaling) | {"rope_theta": rope.theta}
        for kind, rope in ((FULL, full), (SLIDING, a.window_rope or full))
    }
    default = a.rope_scaling.kind == "default"
    return {
        "rope_theta": a.rope_theta,
        "rope_scaling": None if default else _write(a.rope_scaling),
        "rope_parameters": parameters,
    }


def _write(scaling: RopeScaling) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "default":
        rope["factor"] = scaling.factor
    if scaling.kind not in ("default", "linear"):
        rope[ORIGINAL] = scaling.original_max_position
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind in ("yarn", "longrope"):
        rope["attention_factor"] = scaling.attention_factor
    if scaling.kind == "yarn":
        rope["beta_fast"], rope["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        rope["truncate"] = scaling.truncate
    if scaling.kind == "longrope":
        rope["short_factor"] = list(scaling.short)
        rope["long_factor"] = list(scaling.long)
    return rope
