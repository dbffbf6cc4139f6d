"""Is full fine-tuning better than LoRA of rank 16 after the same updates?

    python -m launch.sweep --sweep=configs/sweeps/full_vs_lora.py

Each at its own learning rate, full training also at a third and three times of it: a
single rate would compare the rates.
"""

from configs.sweeps import small
from launch.sweep import Sweep, listed


def get_sweep():
    full = {
        f"full, {rate:g}": {"trainable": "full", "optim.learning_rate": rate}
        for rate in (1.5e-5, 5e-5, 1.5e-4)
    }
    return Sweep(
        config=small.CONFIG,
        changes=small.SIZES,
        axes=[listed("trained", lora={}, **full)],
    )
