"""Turns rows and raw text into batches, in an order that a checkpoint can save."""
