"""Any tree of arrays on disk: written whole with checksums, or not there; `python -m
research.checkpoints` inspects it. Knows no training.
"""
