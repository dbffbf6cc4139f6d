"""`python -m research.generate`: talk to a run."""
