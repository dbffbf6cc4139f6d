"""`python -m research.plan`: plans memory, traffic and speed of a config on chips that
are not here; it reads no weights and no data.
"""
