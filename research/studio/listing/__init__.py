"""The run directories that are there, and the facts of each, from small files."""
