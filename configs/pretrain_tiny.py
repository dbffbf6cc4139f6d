"""Pre-training of a 6-million-parameter Llama on the Python standard library.

    python -m research.train --config=configs/pretrain_tiny.py

Hardware: any; sized for 2 CPU cores and 2 GB of memory.
Duration: about 7 minutes there, set-up and report included (measured, JAX 0.12, bf16).
Expect: 1.43 bits per byte of held-out library source of Python 3.13 (measured).
"""

from research.config import defaults


def get_config():
    config = defaults()
    config.run_dir = "runs/pretrain_tiny"
    config.trainable = "full"
    config.export = True
    config.steps = 900
    config.model.init_from = ""
    config.model.preset = "llama-6m"
    config.model.loss_chunk = 512
    config.data.kind = "text"
    config.data.seq_len = 256
    config.data.batch_size = 8
    config.text.sources = ("stdlib=stdlib",)
    config.text.tokenizer = "bpe:4096"
    config.optim.learning_rate = 3e-3
    config.optim.b2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.schedule = "wsd"
    config.optim.decay = 0.4
    config.optim.final = 0.05
    config.eval.every = 150
    config.eval.samples_every = 300
    config.eval.max_new_tokens = 64
    config.eval.text_prompts = ("def ", "import ", '"""Return')
    config.checkpoint.every = 300
    return config
