"""Pre-training of a Llama with 1b parameters on web text: 50 B tokens.

    python -m research.train --config=configs/pretrain_1b.py

Hardware: TPU v5e-64 or 16 H100.
Duration: about 22 hours on v5e-64 (planned: 640 k tokens/s at 40 % MFU).
Expect: loss 2.7 on FineWeb-Edu (planned).
"""

from research.config import defaults


def get_config():
    config = defaults()
    config.run_dir = "runs/pretrain_1b"
    config.trainable = "full"
    config.export = True
    config.steps = 48000
    config.model.init_from = ""
    config.model.preset = "llama-1b"
    config.model.remat = "full"
    config.model.loss_chunk = 1024
    config.data.kind = "text"
    config.data.seq_len = 2048
    config.data.batch_size = 512
    config.data.microbatch_size = 0
    config.data.hub_timeout = 30.0
    config.text.sources = ("web=hub://HuggingFaceFW/fineweb-edu:sample-100BT",)
    config.text.tokenizer = "hub://unsloth/Llama-3.2-1B"
    config.text.undecodable = "skip"
    config.text.cache = False  # Already shuffled, and read about once.
    config.text.held_out_share = 0.001
    config.text.held_out_bytes = 5_000_000
    config.optim.learning_rate = 3e-4
    config.optim.warmup = 0.02
    config.optim.b2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.z_loss = 1e-4
    config.optim.skip_spread = 6.0
    config.eval.every = 500
    config.eval.samples_every = 2000
    config.eval.text_prompts = ("The", "In 1969,", "To make bread,")
    config.checkpoint.every = 1000
    config.mesh.fsdp = -1
    config.mesh.data = 1
    return config
