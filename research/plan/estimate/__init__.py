"""A step by formula: memory, FLOPs, roofline."""
