"""Frozen weights in NF4 with a scale for every 16 inputs: 4.52 bits that lose less."""

from research.weights.quantized.block_codes import BlockFormat

FORMAT = BlockFormat("nf4", block=16)
