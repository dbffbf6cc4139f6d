"""`python -m research.control`: ask a running job to stop, save or sample."""
