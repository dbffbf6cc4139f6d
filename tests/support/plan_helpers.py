"""Configs of large models for the tests of plans; shapes are given beside them."""

from research.config.run_config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TextConfig,
)
from research.models.presets import PRESETS

ONE_B, EIGHT_B = PRESETS["llama-1b"], PRESETS["llama3.1-8b"]


def big_config(kind="full", rows=64, micro=0, mesh=None, remat="full", seq=2048):
    """The config of a large model, whose shape is given beside it."""
    base = {"init_from": "hub://o/n"} if kind == "lora" else {"init_from": ""}
    return Config(
        trainable=kind,
        model=ModelConfig(preset="llama-1b", remat=remat, loss_chunk=1024, **base),
        mesh=mesh or MeshConfig(fsdp=-1, data=1),
        data=DataConfig("text", seq_len=seq, batch_size=rows, microbatch_size=micro),
        text=TextConfig(sources=("web=hub://o/web",)),
    )


def preset_of(config):
    """The shape of a base model on the hub, by the size in its name."""
    name = config.model.init_from.lower()
    return f"llama3.1-{'70b' if '70b' in name else '8b'}" if "hub://" in name else ""
