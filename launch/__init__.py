"""`python -m launch TARGET`: starts training on this machine or elsewhere.

It imports `research`; `research` never imports it.
"""
