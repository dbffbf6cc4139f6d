"""Evaluations: the commands that make them, and the files that hold them."""
