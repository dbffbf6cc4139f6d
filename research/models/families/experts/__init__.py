"""Families with a mixture of experts in the place of each MLP."""
