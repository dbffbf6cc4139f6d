"""A task is what differs between jobs: its rows, its objective, its metrics, its
samples.
"""
