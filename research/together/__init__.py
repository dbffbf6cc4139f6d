"""Several LoRA runs as one program: one frozen base, one compilation, one step.

compatible which runs can
members    what they do not share, as arrays
step       the train and evaluation step of all of them, under `vmap` or in turn
runs       from configs to run directories: open, resume, train, report
"""
