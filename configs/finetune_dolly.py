"""LoRA fine-tuning of SmolLM2-135M-Instruct on Dolly-style instructions.

    python -m research.train --config=configs/finetune_dolly.py

Hardware: any; made for 2 CPU cores.
"""

from research.config import defaults


def get_config():
    config = defaults()
    config.run_dir = "runs/finetune_dolly"
    config.steps = 60
    config.data.batch_size = 4
    config.data.microbatch_size = 2
    return config
