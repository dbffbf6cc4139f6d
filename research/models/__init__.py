"""Decoder models in Flax NNX: architecture, layers, attention. Only this room imports
Flax.
"""
