"""Which layers need adapters of rank 16: attention, MLP, or both?

python -m launch.sweep --sweep=configs/sweeps/lora_targets.py
"""

from configs.sweeps import small
from launch.sweep import Sweep, listed


def get_sweep():
    return Sweep(
        config=small.CONFIG,
        changes=small.SIZES,
        axes=[
            listed(
                "lora.targets",
                all={"lora.targets": ("attention", "mlp")},
                attention={"lora.targets": ("attention",)},
                mlp={"lora.targets": ("mlp",)},
            )
        ],
    )
