"""Looks at the data and the start of a run before it starts, and trains nothing."""
