"""A step as the TPU compiler builds it: memory, traffic, collectives."""
