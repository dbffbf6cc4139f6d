"""`python -m launch TARGET`: starts training here or elsewhere. Imports `research`,
never the other way round.
"""
