"""Parameters before and after they exist: their names and shapes, the values that may
stand where an array stands (plain, transposed, low-rank, later quantized), and the
adapters. Imports JAX and NumPy only.
"""
