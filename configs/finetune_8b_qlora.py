"""LoRA fine-tuning of Llama 3.1 8B Instruct over a base in four bits (QLoRA).

    python -m research.train --config=configs/finetune_8b_qlora.py

Hardware: one accelerator with 24 GB (planned: research.plan --device=24GB).
Duration: not measured.
Expect: a held-out loss near that of configs/finetune_8b.py (planned).
"""

from research.config import defaults


def get_config():
    config = defaults()
    config.run_dir = "runs/finetune_8b_qlora"
    config.steps = 300
    config.model.init_from = "hub://unsloth/Llama-3.1-8B-Instruct"
    config.model.quantize = "nf4"
    config.model.remat = "full"
    config.data.path = "hub://databricks/databricks-dolly-15k"
    config.data.seq_len = 2048
    config.data.batch_size = 16
    config.data.microbatch_size = 2
    config.data.held_out = 500
    config.data.hub_timeout = 30.0
    config.optim.learning_rate = 2e-4
    config.eval.every = 50
    return config
