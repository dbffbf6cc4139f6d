"""Frozen weights in NF4: levels that suit normally distributed weights."""

from research.weights.quantized.block_codes import BlockFormat

FORMAT = BlockFormat("nf4")
