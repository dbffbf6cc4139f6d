"""`python -m research.train`: one run, or a pack of runs, from config to report."""
