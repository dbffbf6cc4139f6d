"""Divides a large source of text into shares, which are read side by side."""
