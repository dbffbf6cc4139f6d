"""Pre-training of a Llama with 125m parameters on 2.5 B tokens of web text.

    python -m research.train --config=configs/pretrain_125m.py

Hardware: one host of 8 accelerators with 80 GB (H100), or a TPU v5e-8.
Duration: 7 to 12 minutes on 8 H100 (planned: 3.6 to 6.0 M tokens/s at 34 to 56 % MFU),
    half an hour to an hour on v5e-8 (planned: 0.75 to 1.27 M tokens/s, 36 to 60 %).
Expect: loss 3.2 on FineWeb-Edu, about 1.0 bits per byte (planned).
"""

from research.config import defaults


def get_config():
    config = defaults()
    config.run_dir = "runs/pretrain_125m"
    config.trainable = "full"
    config.export = True
    config.steps = 9600
    config.model.init_from = ""
    config.model.preset = "llama-125m"
    config.model.remat = "none"
    config.data.kind = "text"
    config.data.seq_len = 1024
    config.data.batch_size = 256
    config.data.microbatch_size = 128
    config.data.hub_timeout = 30.0
    config.text.sources = ("web=hub://HuggingFaceFW/fineweb-edu:sample-10BT",)
    config.text.tokenizer = "hub://HuggingFaceTB/SmolLM2-135M"
    config.text.undecodable = "skip"
    config.text.cache = False  # Already shuffled, and read about once.
    config.text.held_out_bytes = 5_000_000
    config.optim.learning_rate = 6e-4
    config.optim.warmup = 0.02
    config.optim.b2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.z_loss = 1e-4
    config.optim.skip_spread = 6.0
    config.eval.every = 500
    config.eval.samples_every = 2000
    config.eval.text_prompts = ("The", "In 1969,", "To make bread,")
    config.checkpoint.every = 1000
    config.mesh.data = -1
    config.runtime.topology = "v5e:2x4"
    return config
