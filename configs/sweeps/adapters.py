"""Which kind of adapter is best once each has its own learning rate?

    python -m launch.sweep --sweep=configs/sweeps/adapters.py --together=36 -- \
        --config.data.path=dolly-15k.jsonl.gz

Six kinds, three learning rates and three seeds are 54 runs of rank 16. The rates lie a
factor of five apart, so that the best one of each kind is among them: rsLoRA multiplies
its product by 4, and LoRA+ the rate of B by 16, so both want a lower rate than LoRA.
QLoRA trains over a base in NF4, and its loss is that of the quantised model.

Each run sees 20 updates of 2 rows of 256 tokens, about 10,000 tokens. So the sweep says
which kind learns faster, at which rate, and not which one ends better after a long run.
Give more with `--config.steps=...`.
"""

from configs.sweeps import small
from launch.sweep import Sweep, grid, listed


def get_sweep():
    return Sweep(
        config=small.CONFIG,
        changes=small.SIZES
        | {
            "steps": 20,
            "data.seq_len": 256,
            "data.max_rows": 2000,
            "data.held_out": 24,
            "eval.every": 20,
            "eval.prompts": 0,
        },
        axes=[
            listed(
                "adapter",
                lora={},
                rslora={"lora.rslora": True},
                dora={"lora.kind": "dora"},
                loraplus={"optim.rate_pattern": (r"[.]b$=16",)},
                pissa={"lora.kind": "pissa", "lora.pissa_niter": 4},
                qlora={"model.quantize": "nf4"},
            ),
            grid("optim.learning_rate", 1e-4, 5e-4, 2.5e-3),
        ],
        baseline={"optim.learning_rate": "0.0005"},
    )
