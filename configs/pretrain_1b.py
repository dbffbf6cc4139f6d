"""Pre-training of a Llama with 1b parameters on web text: 50 B tokens.

    python -m research.train --config=configs/pretrain_1b.py

Hardware: TPU v5e-64 or 16 H100.
Duration: 11 to 20 hours on v5e-64 (planned: 705 k to 1.27 M tokens/s; 22 at 40 % MFU).
Expect: loss 2.7 on FineWeb-Edu (planned).
"""

from configs import pretrain_125m


def get_config():
    config = pretrain_125m.get_config()
    config.run_dir = "runs/pretrain_1b"
    config.steps = 48000
    config.model.preset = "llama-1b"
    config.model.remat = "full"
    config.data.seq_len = 2048
    config.data.batch_size = 512
    config.data.microbatch_size = 0
    config.text.sources = ("web=hub://HuggingFaceFW/fineweb-edu:sample-100BT",)
    config.text.tokenizer = "hub://unsloth/Llama-3.2-1B"
    config.optim.learning_rate = 3e-4
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.runtime.topology = "v5e:8x8"
    return config
