"""The other sides of `jax_rivals.py`: a LoRA step of MaxText, and one of Tunix.

Run by an interpreter that has maxtext, google-tunix and qwix, never imported by the
rest of the project. Each side is what its own trainer compiles: MaxText's model, loss
and `MaxTextPeftTrainer`, or Tunix's Llama and `PeftTrainer`, with qwix's adapters on
every linear layer of the blocks, AdamW, random weights in bfloat16 and the same random
rows as our side, every position trained.
"""

import argparse
import json
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from random_rows import random_rows
from steps_on_request import serve

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def optimizer() -> optax.GradientTransformation:
    """As configs/finetune_dolly.py has it: a clipped AdamW without decay."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(2e-4, weight_decay=0)
    )


def in_bfloat16(model: nnx.Module) -> nnx.Module:
    """The same with its float32 parameters in bfloat16."""
    state = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x,
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, state)
    return model


def scalars(model: nnx.Module, kind: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, kind)))


def maxtext(arguments: argparse.Namespace, shape: dict[str, Any]) -> tuple[Any, Any]:
    """MaxText's trainer, and the arrays of a batch as its loss takes them."""
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.trainers.post_train.sft import train_sft
    from maxtext.utils import lora_utils, model_creation_utils

    folder = Path(maxtext.__file__).parent / "configs"
    settings = {
        "run_name": "rival",
        "base_output_directory": tempfile.mkdtemp(),
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "attention": "dot_product",
        "dataset_type": "synthetic",
        "decoder_block": "llama2",
        "base_emb_dim": shape["hidden_size"],
        "base_mlp_dim": shape["intermediate_size"],
        "base_num_decoder_layers": shape["num_hidden_layers"],
        "base_num_query_heads": shape["num_attention_heads"],
        "base_num_kv_heads": shape["num_key_value_heads"],
        "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab_size"],
        "logits_via_embedding": shape["tie_word_embeddings"],
        "normalization_layer_epsilon": shape["rms_norm_eps"],
        "rope_max_timescale": int(shape["rope_theta"]),
        "per_device_batch_size": arguments.rows,
        "max_target_length": arguments.seq,
        "dtype": "bfloat16",
        "weight_dtype": "bfloat16",
        "enable_dropout": False,
        "scan_layers": arguments.scan,
        "remat_policy": arguments.remat,
        "gradient_clipping_threshold": 0,
    }
    lora = {"enable_lora": True, "lora_rank": arguments.rank, "lora_alpha": 32.0}
    config = pyconfig.initialize_pydantic(
        ["", str(folder / "post_train" / "sft.yml")], lora=lora, **settings
    )
    model, mesh = model_creation_utils.from_pretrained(config)
    rows = random_rows((arguments.rows, arguments.seq), shape["vocab_size"])
    segments = rows["segments"]
    batch = {
        "inputs": rows["tokens"],
        "inputs_position": rows["positions"],
        "inputs_segmentation": segments,
        "targets": rows["targets"],
        "targets_position": rows["positions"],
        "targets_segmentation": segments * (rows["weights"] > 0),
    }
    context = jax.set_mesh(mesh)
    context.__enter__()
    model = lora_utils.apply_lora_to_model(model, mesh, config)
    nnx.pop(model, nnx.Intermediate)
    trainer = train_sft.MaxTextPeftTrainer(
        model, optimizer(), train_sft.get_tunix_config(config)
    )
    trainer = train_sft.use_maxtext_loss_function(trainer, config)
    return trainer, batch


def tunix(arguments: argparse.Namespace, shape: dict[str, Any]) -> tuple[Any, Any]:
    """Tunix's trainer, and the arrays of a batch as its loss takes them."""
    from tunix.models.llama3 import model as llama
    from tunix.sft import peft_trainer

    remat = {"none": "NONE", "block": "BLOCK", "full": "DECODER"}[arguments.remat]
    config = llama.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=shape["rms_norm_eps"],
        weight_tying=shape["tie_word_embeddings"],
        remat_config=llama.RematConfig[remat],
    )
    base = in_bfloat16(llama.Llama3(config, rngs=nnx.Rngs(0)))
    provider = qwix.LoraProvider(
        module_path=".*(" + "|".join(map(re.escape, LINEAR)) + ")",
        rank=arguments.rank,
        alpha=2.0 * arguments.rank,
    )
    model = qwix.apply_lora_to_model(
        base, provider, **base.get_model_input(), rngs=nnx.Rngs(0)
    )
    trainer = peft_trainer.PeftTrainer(
        model, optimizer(), peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    )
    rows = random_rows((arguments.rows, arguments.seq), shape["vocab_size"])
    causal = np.tril(np.ones((arguments.seq, arguments.seq), bool))
    batch = {
        "input_tokens": rows["tokens"],
        "input_mask": np.ones_like(rows["tokens"]),
        "positions": rows["positions"],
        "attention_mask": np.broadcast_to(
            causal, (arguments.rows, *causal.shape)
        ).copy(),
    }
    return trainer.with_gen_model_input_fn(dict), batch


SIDES = {"maxtext": maxtext, "tunix": tunix}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--side", choices=tuple(SIDES), required=True)
    add("--shape", type=Path, required=True, help="config.json of a Llama")
    add("--rows", type=int, required=True)
    add("--seq", type=int, required=True)
    add("--rank", type=int, required=True)
    add("--remat", default="full")
    add("--scan", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    shape = json.loads(arguments.shape.read_text(encoding="utf-8"))
    trainer, batch = SIDES[arguments.side](arguments, shape)
    batch = jax.tree.map(jnp.asarray, batch)
    train_step, _ = trainer.jit_train_and_eval_step(False, True)

    def step() -> float:
        loss = train_step(batch)[0]
        jax.block_until_ready(nnx.state(trainer.model, nnx.LoRAParam))
        return float(loss)

    named = ("jax", "flax", "maxtext", "google-tunix", "qwix")
    dtypes = {
        str(x.dtype) for x in jax.tree.leaves(nnx.state(trainer.model, nnx.LoRAParam))
    }
    about = {
        "trained": scalars(trainer.model, nnx.LoRAParam),
        "trained_dtype": ", ".join(sorted(dtypes)),
        "versions": {name: metadata.version(name) for name in named},
    }
    serve(step, about)


if __name__ == "__main__":
    main()
