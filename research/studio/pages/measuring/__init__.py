"""Pages on how good runs are: evaluations and sweeps."""
