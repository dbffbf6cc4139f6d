"""Decoder models in Flax NNX, and their families. Only this room imports Flax."""
