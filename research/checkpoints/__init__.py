"""Training state on disk: written whole with checksums, or not there; `python -m
research.checkpoints` inspects it.
"""
