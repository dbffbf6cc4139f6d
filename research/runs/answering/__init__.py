"""Runs that answer together: one base model, and the adapters of many runs."""
