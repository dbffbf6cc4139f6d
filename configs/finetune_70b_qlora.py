"""LoRA fine-tuning of Llama 3.3 70B Instruct over a base in four bits (QLoRA).

    python -m research.train --config=configs/finetune_70b_qlora.py
    python -m research.train --config=configs/finetune_70b_qlora.py \
        --config.data.microbatch_size=1 --config.runtime.topology=   # one H100 80 GB

Hardware: TPU v5e-16, or one accelerator with 80 GB and the flags above.
Duration: not measured.
Expect: a held-out loss below the base model's in every category (planned).
"""

from research.config import defaults


def get_config():
    config = defaults()
    config.run_dir = "runs/finetune_70b_qlora"
    config.steps = 300
    config.model.init_from = "hub://unsloth/Llama-3.3-70B-Instruct"
    config.model.quantize = "nf4"
    config.model.remat = "full"
    config.data.path = "hub://databricks/databricks-dolly-15k"
    config.data.seq_len = 2048
    config.data.batch_size = 16
    config.data.microbatch_size = 16
    config.data.held_out = 500
    config.data.hub_timeout = 60.0
    config.optim.learning_rate = 1e-4
    config.eval.every = 50
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.runtime.topology = "v5e:4x4"
    return config
