"""Frozen weights in NF4 with a scale for every 16 inputs, which lose less for 9 % more."""

from research.weights.quantized.block_codes import BlockFormat

FORMAT = BlockFormat("nf4", block=16)
