"""Sweeps: the commands that start them, and the files of their folders."""
