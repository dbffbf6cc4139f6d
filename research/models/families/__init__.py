"""Model families, one file each: how other tools spell the config and name the tensors
of a model, and which switches of the Block it sets. `family_registry.py` lists them.
"""
