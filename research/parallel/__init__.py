"""Devices, processes and where each array lies: the mesh, its rules, chips, start of
processes.
"""
