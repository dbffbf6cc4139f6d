"""Which rank do adapters on all linear layers need for Dolly?

    python -m launch.sweep --sweep=configs/sweeps/lora_rank.py

Alpha is twice the rank, so that only the number of directions differs and not the size
of the first step.
"""

from configs.sweeps import small
from launch.sweep import Sweep, listed


def get_sweep():
    ranks = (4, 16, 64)
    axis = {str(r): {"lora.rank": r, "lora.alpha": 2.0 * r} for r in ranks}
    return Sweep(
        config=small.CONFIG,
        changes=small.SIZES,
        axes=[listed("lora.rank", **axis)],
        baseline={"lora.rank": "16"},
    )
