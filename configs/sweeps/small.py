"""The sweeps of this folder share this: SmolLM2 on Dolly, sized for 2 CPU cores.

A run sees 40 updates of 2 rows of 512 tokens, about 41,000 tokens, and is judged on 48
held-out rows. Give more with `-- --config.steps=... --config.data.batch_size=...`.
"""

CONFIG = "configs/finetune_dolly.py"
SIZES = {
    "steps": 40,
    "data.batch_size": 2,
    "data.microbatch_size": 2,
    "eval.every": 10,
    "eval.prompts": 1,
    "eval.max_new_tokens": 32,
    "checkpoint.every": 20,
}
