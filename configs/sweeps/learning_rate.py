"""Which peak learning rate suits LoRA of rank 16 in 40 updates?

python -m launch.sweep --sweep=configs/sweeps/learning_rate.py
"""

from configs.sweeps import small
from launch.sweep import Sweep, grid


def get_sweep():
    return Sweep(
        config=small.CONFIG,
        changes=small.SIZES,
        axes=[grid("optim.learning_rate", 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)],
        baseline={"optim.learning_rate": "0.0005"},
    )
