"""Several LoRA runs as one program: one frozen base, one compilation, one step.

members    what may differ between runs, and a run's numbers as arrays
step       the train and evaluation step of all of them, by `vmap`
runs       from configs to run directories: open, resume, train, report
"""
