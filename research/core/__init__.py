"""The floor that every room stands on: errors, file writes, cache folders, hub access.
Imports no other room.
"""
