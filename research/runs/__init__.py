"""The life of a run directory: its files, history, lock, signals, watchdog, and how to
reopen it. Its door, `python -m research.runs`, asks a running job to stop, save or
sample.
"""
