"""Runs chat templates under limits, and cuts them into words and holes for texts."""
