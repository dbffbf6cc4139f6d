"""Starts the programs of `research` on one machine or many."""
