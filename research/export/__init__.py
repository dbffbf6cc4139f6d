"""`python -m research.export`: write the model of a run for other tools."""
