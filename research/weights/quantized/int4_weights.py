"""Frozen weights in four-bit integers: levels in equal steps."""

from research.weights.quantized.block_codes import BlockFormat

FORMAT = BlockFormat("int4")
