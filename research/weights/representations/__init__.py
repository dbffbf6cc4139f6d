"""One file for each way to hold a weight: as a plain array, as a transposed view, as a
base with a low-rank update or with many. Weights in codes are in `quantized/`.
"""
