"""Frozen weights in 16 equal steps from the least of 32 inputs to the largest."""

from research.weights.quantized.block_codes import BlockFormat

FORMAT = BlockFormat("int4_32", block=32, has_offsets=True)
