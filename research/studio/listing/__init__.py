"""What run directories are there, and what is known of each without opening a model."""
