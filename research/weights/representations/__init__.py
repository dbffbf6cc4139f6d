"""One file for each way to hold a weight: as a plain array, as a transposed view, as a
base with a low-rank update or with many, as bytes with a scale for each channel. A
4-bit weight is one more file here.
"""
