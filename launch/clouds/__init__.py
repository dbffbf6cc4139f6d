"""Shared by cloud targets: TPU slices, rented machines, jobs without local files."""
