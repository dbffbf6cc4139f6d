"""Pages on how good runs are, and on what they need: evaluations, sweeps, plans."""
