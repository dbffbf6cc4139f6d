"""Rotary embeddings in llama.cpp's metadata, and the tables that lie beside them.

Scaled frequencies of Llama 3.1 lie in a file only as a table of divisors, and so do
those of LongRoPE, as one table for short rows and one for long ones.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.models.architecture import Architecture, Rope, RopeScaling
from research.models.families.config_fields import ConfigFields
from research.models.families.rope_fields import ORIGINAL
from research.models.parts.rotary import rope_frequencies

TABLES = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
DIVISORS, SHORT, LONG = TABLES
SCALING = "rope.scaling."
# Divisors are float32, and each is the ratio of two.
CLOSE = 2e-6


def read_rope(
    fields: ConfigFields, head_dim: int, tables: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The rotary embedding in the older spelling of a `config.json`.

    Args:
      fields: the metadata, without the architecture in front of their names.
      head_dim: width of a head.
      tables: those of `TABLES` that the file has.

    Raises:
      UserError: a field or a table is malformed.
    """
    config: dict[str, Any] = {"rope_theta": fields.number("rope.freq_base", 10000.0)}
    turned = fields.integer("rope.dimension_count", head_dim, high=head_dim)
    share = turned / head_dim
    # Its product with the width must not fall below the whole number.
    whole = int(head_dim * share) == turned
    config["partial_rotary_factor"] = share if whole else math.nextafter(share, 1)
    for name, table in tables.items():
        if table.shape != (turned // 2,) or not np.all((table > 0) & (table < 1e30)):
            raise UserError(
                f"{fields.where}: {name} must hold {turned // 2} numbers above 0, one "
                "for each pair of a head that is rotated"
            )
    rope = Rope(config["rope_theta"], fraction=config["partial_rotary_factor"])
    scaling = _read_scaling(fields, rope, head_dim, tables)
    if ORIGINAL in scaling:
        config[ORIGINAL] = scaling.pop(ORIGINAL)
    return config | {"rope_scaling": scaling or None}


def _read_scaling(
    fields: ConfigFields, rope: Rope, head_dim: int, tables: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    kind = fields.text(f"{SCALING}type", "none") or "none"
    factor = fields.number(f"{SCALING}factor", 1.0)
    longest = fields.integer("context_length", 2048)
    name = f"{SCALING}original_context_length"
    original = {ORIGINAL: fields.integer(name, longest, low=2)}
    warmth = fields.number(f"{SCALING}attn_factor", 1.0)
    if tables.keys() & {SHORT, LONG}:
        if not {SHORT, LONG} <= tables.keys() or DIVISORS in tables or factor != 1.0:
            raise UserError(
                f"{fields.where}: LongRoPE needs both {SHORT} and {LONG}, and neither "
                f"{DIVISORS} nor {SCALING}factor beside them"
            )
        lists: dict[str, Any] = {
            f"{name}_factor": [shortest(x) for x in tables[table]]
            for name, table in (("short", SHORT), ("long", LONG))
        }
        lists["attention_factor"] = warmth
        return {"rope_type": "longrope", **lists, **original}
    if DIVISORS in tables:
        if kind not in ("none", "linear") or factor != 1.0:
            raise UserError(
                f"{fields.where}: {SCALING}type is {kind!r} with the factor {factor:g},"
                f" beside the table {DIVISORS}; only one of the two can be computed"
            )
        return _read_divisors(rope, head_dim, tables[DIVISORS], longest)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= original
        if warmth != 1.0:
            product = np.float32(warmth * yarn_warmth(factor))
            scaling["attention_factor"] = shortest(product)
        for end in ("fast", "slow"):
            name = f"{SCALING}yarn_beta_{end}"
            if fields.get(name):
                scaling[f"beta_{end}"] = fields.number(name)
    return scaling


def _read_divisors(
    rope: Rope, head_dim: int, divisors: np.ndarray, longest: int
) -> dict[str, Any]:
    """The settings of Llama 3.1 that make this table; or else the table itself.

    Many settings make the same table: multiplying the original context and both
    factors by one number changes nothing. The usual ones are tried first.
    """
    if np.all(divisors == 1):
        return {}
    for scaling in _settings(rope, head_dim, divisors):
        same = Rope(rope.theta, scaling, rope.fraction)
        if np.allclose(rope_divisors(same, head_dim), divisors, rtol=CLOSE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                ORIGINAL: scaling.original_max_position,
            }
    # LongRoPE with one table for rows of all lengths computes the same.
    table = [shortest(x) for x in divisors]
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": table,
        "long_factor": table,
        ORIGINAL: max(2, longest),
    }


def _settings(rope: Rope, head_dim: int, divisors: np.ndarray) -> Iterator[RopeScaling]:
    factor = shortest(divisors.max())
    if factor <= 1:
        return
    for original, high in itertools.product((8192, 4096, 2048, 32768), (4.0,)):
        yield RopeScaling("llama3", factor, 1.0, high, original)
    # Between both ends, the kept share of a frequency is linear in the frequency.
    kept = (1 / np.float64(divisors) - 1 / factor) / (1 - 1 / factor)
    inner = (kept > 1e-4) & (kept < 1 - 1e-4)
    if inner.sum() < 2:
        return
    frequencies = np.asarray(rope_frequencies(rope, head_dim), np.float64)
    slope, start = np.polyfit(frequencies[inner], kept[inner], 1)
    if start >= 0 or slope <= 0:
        return
    width = -1 / start  # with a low factor of 1
    original = round(2 * math.pi * slope * width)
    for digits in (1, 3, 6):
        yield RopeScaling(
            "llama3", factor, 1.0, round(1 + width, digits), max(2, original)
        )


def rope_divisors(rope: Rope, head_dim: int) -> np.ndarray:
    """The number that divides the frequency of each rotary pair, float32."""
    plain = rope_frequencies(Rope(rope.theta, fraction=rope.fraction), head_dim)
    return np.asarray(plain / rope_frequencies(rope, head_dim), np.float32)


def rope_tables(a: Architecture) -> dict[str, np.ndarray]:
    """The tables that lie beside the parameters of this model, float32."""
    scaling = a.rope_scaling
    if scaling.kind == "llama3":
        rope = Rope(a.rope_theta, scaling, a.rope_fraction)
        return {DIVISORS: rope_divisors(rope, a.head_dim)}
    if scaling.kind == "longrope":
        return {
            SHORT: np.array(scaling.short, np.float32),
            LONG: np.array(scaling.long, np.float32),
        }
    return {}


def write_rope(a: Architecture) -> dict[str, Any]:
    """The metadata that `read_rope` reads beside `rope_tables`."""
    if a.positions != "rope":
        return {}
    scaling = a.rope_scaling
    metadata: dict[str, Any] = {
        "rope.freq_base": float(a.rope_theta),
        "rope.dimension_count": int(a.head_dim * a.rope_fraction),
    }
    if scaling.kind in ("linear", "yarn"):
        metadata[f"{SCALING}type"] = scaling.kind
        metadata[f"{SCALING}factor"] = float(scaling.factor)
    if scaling.kind in ("longrope", "yarn"):
        name = f"{SCALING}original_context_length"
        metadata[name] = scaling.original_max_position
    if scaling.kind == "longrope":
        metadata[f"{SCALING}type"] = "longrope"
        metadata[f"{SCALING}attn_factor"] = float(scaling.attention_factor)
    if scaling.kind == "yarn":
        warmth = scaling.attention_factor / yarn_warmth(scaling.factor)
        if abs(warmth - 1) > CLOSE:
            metadata[f"{SCALING}attn_factor"] = warmth
        metadata[f"{SCALING}yarn_beta_fast"] = float(scaling.beta_fast)
        metadata[f"{SCALING}yarn_beta_slow"] = float(scaling.beta_slow)
    return metadata


def yarn_warmth(factor: float) -> float:
    """By what llama.cpp multiplies cosines and sines itself: YaRN, eq. 22."""
    return 0.1 * math.log(factor) + 1.0


def shortest(value: float) -> float:
    """The decimal number that a float32 was made from: 1e-5, not 9.99999975e-06."""
    single = np.float32(value)
    return float(str(single)) if single == value else float(value)
