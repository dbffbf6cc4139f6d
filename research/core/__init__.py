"""The floor that every room stands on: errors, atomic file writes, cache folders, hub
access. Imports no other room.
"""
