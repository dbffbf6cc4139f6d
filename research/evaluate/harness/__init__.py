"""lm-evaluation-harness on a run directory, an optional extra: `lm-eval`."""
