"""`python -m research.evaluate`: the losses of a run on other rows."""
