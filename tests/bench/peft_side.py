"""The other side of `accelerator.py`: transformers' Llama, PEFT and torch's SDPA.

Run by an interpreter that has torch, transformers and peft, never imported by the rest
of the project. Random weights of a given shape in bfloat16, rank-r adapters on every
linear layer but the head, AdamW, the loss that transformers computes from labels; the
same random rows as our side. Prints one JSON line on stdout.

    python tests/bench/peft_side.py --shape=config.json --rows=16 --micro=2 --seq=2048

A row is one document: SDPA needs no mask then, which is its fastest case. Adapters are
float32 under autocast, as `Trainer(bf16=True)` trains them, or bfloat16 without it.
`--quantize=nf4` or `int8` puts the matrices that get adapters into bitsandbytes' codes,
as `transformers` does: nf4 with its scales in codes too, int8 with outliers above 6.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# Read by the Hugging Face libraries while they are imported, so set before they are.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import peft
import torch
import transformers
from random_rows import random_rows
from steps_on_request import serve

IGNORED_LABEL = -100


def in_codes(linear: torch.nn.Linear, codes: str) -> torch.nn.Module:
    """The same layer with its matrix in bitsandbytes' codes."""
    import bitsandbytes as bnb

    size, device = (linear.in_features, linear.out_features), linear.weight.device
    weight = linear.weight.data
    if codes == "nf4":
        made = bnb.nn.Linear4bit(
            *size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        made.weight = bnb.nn.Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4",
            compress_statistics=True, module=made,
        )  # fmt: skip
    else:
        made = bnb.nn.Linear8bitLt(
            *size, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        made.weight = bnb.nn.Int8Params(
            weight.cpu(), requires_grad=False, has_fp16_weights=False
        )
    return made.to(device)


def quantize(model: Any, codes: str) -> None:
    """Replaces every linear layer but the head, one after the other."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    for name, linear in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, in_codes(linear, codes))
    # By these PEFT knows which layers it wraps.
    model.is_loaded_in_4bit = codes == "nf4"
    model.is_loaded_in_8bit = codes == "int8"


def make_model(arguments: argparse.Namespace, device: torch.device) -> Any:
    """A Llama of random weights with adapters, ready to train."""
    fields = json.loads(arguments.shape.read_text(encoding="utf-8"))
    config = transformers.LlamaConfig.from_dict(fields)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    if arguments.quantize:
        quantize(model, arguments.quantize)
    if arguments.recompute:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    lora = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        use_dora=arguments.dora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with device:
        wrapped = peft.get_peft_model(
            model, lora, autocast_adapter_dtype=arguments.adapters == "float32"
        )
    return wrapped.train()


def make_rows(
    arguments: argparse.Namespace, vocab: int, device: torch.device
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
    """Ids and labels of each pass of a step, and how many labels count."""
    shape = arguments.rows, arguments.seq
    drawn = random_rows(shape, vocab, arguments.trained)
    ids = torch.from_numpy(drawn["tokens"]).long()
    weights = torch.from_numpy(drawn["weights"])
    # A label is the id at its own place; transformers shifts them against the logits.
    counts = torch.zeros(shape, dtype=torch.bool)
    counts[:, 1:] = weights[:, :-1] > 0
    labels = torch.where(counts, ids, IGNORED_LABEL)
    ids, labels = ids.to(device), labels.to(device)
    parts = zip(ids.split(arguments.micro), labels.split(arguments.micro), strict=True)
    return list(parts), int(counts.sum())


def attention_forms(model: Any, ids: torch.Tensor, autocast: bool) -> str:
    """The forms of `scaled_dot_product_attention` that a forward pass of `ids` runs."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=kinds) as profile,
        torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast),
    ):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    prefix = "aten::_scaled_dot_product_"
    found = {event.key for event in profile.key_averages()}
    return ",".join(sorted(x.removeprefix(prefix) for x in found if prefix in x))


def make_step(
    arguments: argparse.Namespace, model: Any, vocab: int
) -> tuple[Callable[[], float], int, str]:
    """A step that gives its loss, the labels that count, and SDPA's forms."""
    device = next(model.parameters()).device
    passes, counted = make_rows(arguments, vocab, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=fused)
    autocast = arguments.adapters == "float32"
    forms = attention_forms(model, passes[0][0], autocast)

    def step() -> float:
        total = torch.zeros((), device=device)
        for ids, labels in passes:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = model(
                    input_ids=ids,
                    labels=labels,
                    num_items_in_batch=counted,
                    use_cache=False,
                ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Waits for the device.
        last = total.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return last

    return step, counted, forms


def time_steps(
    arguments: argparse.Namespace, step: Callable[[], float]
) -> tuple[list[float], float]:
    """Seconds of each counted step, and the last loss."""
    seconds, last = [], 0.0
    for _ in range(arguments.warmup + arguments.steps):
        begun = time.perf_counter()
        last = step()
        seconds.append(time.perf_counter() - begun)
    return seconds[arguments.warmup :], last


def peak_bytes(device: torch.device) -> int:
    """Most memory in use: of the card, or of the process on CPU (Linux gives KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", type=Path, required=True, help="config.json of a Llama")
    add("--rows", type=int, default=16, help="rows of an optimizer step")
    add("--micro", type=int, default=1, help="rows of a pass; divides --rows")
    add("--seq", type=int, default=2048, help="tokens of a row")
    add("--trained", type=float, default=1.0, help="share of positions with a loss")
    add("--rank", type=int, default=16)
    add("--dora", action=argparse.BooleanOptionalAction, default=False)
    add("--adapters", choices=("float32", "bfloat16"), default="float32")
    add("--recompute", action=argparse.BooleanOptionalAction, default=False)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--steps", type=int, default=5, help="that count")
    add("--warmup", type=int, default=2, help="steps that do not count")
    add("--quantize", choices=("nf4", "int8"), default="", help="codes of the base")
    add("--serve", action="store_true", help="steps on request, for jax_rivals.py")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"error: torch {torch.__version__} of {sys.executable} finds no GPU; "
            "install a build for CUDA there, or try --device=cpu\n"
        )
        sys.exit(2)
    device = torch.device(arguments.device)
    model = make_model(arguments, device)
    made_gb = 0.0
    if device.type == "cuda":
        made_gb = peak_bytes(device) / 1e9
        torch.cuda.reset_peak_memory_stats()
    step, counted, forms = make_step(arguments, model, model.config.vocab_size)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    used = ["torch", "transformers", "peft"]
    used += ["bitsandbytes"] if arguments.quantize else []
    about = {
        "device": name,
        "attention": f"sdpa: {forms}",
        "positions": counted,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": {name: metadata.version(name) for name in used},
    }
    if arguments.serve:
        serve(step, about)
        return
    seconds, loss = time_steps(arguments, step)
    step_s, held_gb = statistics.median(seconds), peak_bytes(device) / 1e9
    found = about | {
        "tokens_per_s": arguments.rows * arguments.seq / step_s,
        "step_s": step_s,
        "seconds": seconds,
        "memory_gb": max(made_gb, held_gb),
        "step_gb": held_gb,
        "loss": loss,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
