"""The option lists that a knob and another room share: each name is written once.

A registry in a later room has an entry for each name; tests/core/test_choices.py
compares them. Kinds of adapters are checked by their own registry instead, in
`research.weights.adapters.adapter_registry`.
"""

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
# "auto" picks one of the kernels for the devices at hand.
AUTO = "auto"
KERNELS = ("xla", "cudnn", "splash")
REMATS = ("none", "dots", "full")
DTYPES = ("bfloat16", "float32")
UNDECODABLE = ("stop", "skip", "replace")
