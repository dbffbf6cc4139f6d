"""The life of a run directory: its files, history, lock, signals, watchdog, and how to
reopen it.
"""
