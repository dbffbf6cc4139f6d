"""Names such as `prod` that stand for one checkpoint, and can be moved to another."""
