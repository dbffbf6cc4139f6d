"""Frozen matrices in codes: one file for each format, and what all of them share."""
