"""Pre-training of a Llama with 8b parameters on web text: 1 T tokens.

    python -m research.train --config=configs/pretrain_8b.py

Hardware: TPU v5p-512 (256 chips).
Duration: 7 to 9 days (planned: 1.4 to 1.7 M tokens/s at 59 to 75 % MFU).
Expect: loss below 2.2 on FineWeb (planned).
"""

from configs import pretrain_125m


def get_config():
    config = pretrain_125m.get_config()
    config.run_dir = "runs/pretrain_8b"
    config.steps = 120000
    config.model.preset = "llama3.1-8b"
    config.model.remat = "full"
    config.data.seq_len = 8192
    config.data.batch_size = 1024
    config.data.microbatch_size = 512
    config.text.sources = ("web=hub://HuggingFaceFW/fineweb",)
    config.text.tokenizer = "hub://unsloth/Llama-3.1-8B"
    config.optim.learning_rate = 3e-4
    # Over all three axes of the torus XLA would sum the weights instead of gathering.
    config.mesh.fsdp = -1
    config.mesh.data = 4
    config.runtime.topology = "v5p:4x8x8"
    return config
