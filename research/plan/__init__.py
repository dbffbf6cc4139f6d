"""`python -m research.plan`: memory, traffic and speed of a config on chips that are
not here.
"""
