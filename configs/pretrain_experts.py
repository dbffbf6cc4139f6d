"""Pre-training of a small mixture of experts on the Python standard library.

    python -m research.train --config=configs/pretrain_experts.py

Eight experts in each layer, two for each token: 17 million parameters, of which a token
meets as many as in configs/pretrain_tiny.py. metrics.jsonl has the load of experts.

Hardware: any; sized for 2 CPU cores and 3 GB of memory (planned).
Duration: 1.35 times that of configs/pretrain_tiny.py in bfloat16 (measured in seconds
    of all threads; see docs/measured.md).
Expect: below its 1.43 bits per byte of held-out library source (planned).
"""

from configs import pretrain_tiny


def get_config():
    config = pretrain_tiny.get_config()
    config.run_dir = "runs/pretrain_experts"
    config.model.preset = "mixtral-6m"
    return config
