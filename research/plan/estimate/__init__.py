"""A step by formula, without a compiler: its memory, collectives, FLOPs and time."""
