"""Full fine-tuning of SmolLM2-135M-Instruct on the data of `finetune_dolly.py`.

    python -m research.train --config=configs/finetune_dolly_full.py

Every parameter is trained, in float32 with AdamW, so a tenth of LoRA's learning rate
suits it. Compare it with the LoRA run by held-out loss per category at the same step,
by time per step, and by memory.

Hardware: the same, with 2 GB more memory for float32 weights, gradients and moments.
Duration: about half as long again as LoRA (planned, from its FLOPs; not measured).
Expect: a held-out loss near LoRA's on so few rows (planned).
"""

from configs import finetune_dolly


def get_config():
    config = finetune_dolly.get_config()
    config.run_dir = "runs/finetune_dolly_full"
    config.trainable = "full"
    config.optim.learning_rate = 5e-5
    return config
