"""Metrics of answers: each reads rows with answers and gives numbers that add up."""
