"""Devices and processes: the mesh and its sharding rules, the table of chips, and the
start of a process. Knows parameters only by their `Spec`.
"""
