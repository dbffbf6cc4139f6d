"""Is full fine-tuning better than LoRA of rank 16 after the same updates?

    python -m launch.sweep --sweep=configs/sweeps/full_vs_lora.py

Each method has its own learning rate, and full training is also tried at a third and
at three times its rate. With a single rate for all, the sweep would compare the rates.
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
