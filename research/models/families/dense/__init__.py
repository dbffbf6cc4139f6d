"""Families without experts, one file of switches and names each."""
