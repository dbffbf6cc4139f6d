"""Values that stand where arrays stand in a model: low-rank, transposed, quantised;
and the adapters made of them.
"""
