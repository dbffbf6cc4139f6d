"""A LoRA step against MaxText's, Tunix's or PEFT's: equal shapes, in turn, in one run.

    make bench-rivals
    python tests/bench/jax_rivals.py --rivals-python=.venv-rivals/bin/python
    python tests/bench/jax_rivals.py --torch-python=.venv-torch/bin/python \
        --rivals=peft-recompute --shapes=1x8192

Every side is a process with random weights of the shape of SmolLM2-135M in bfloat16,
adapters of rank 16 on every linear layer, AdamW, the same random rows with every
position trained, and the same settings of the allocator. They start one after the
other, and then take their steps in turn, each round beginning with another side, so
that whatever else the machine does slows all of them. MaxText's LoRA is the one of its
own fine-tuning, which is Tunix's trainer with MaxText's model and qwix's adapters.
PEFT's side is transformers' Llama with torch's SDPA, which needs no mask as each row is
one document. Prints one JSON line for each side and shape, then the ratios (median of
the rounds).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_throughput import ALLOCATORS
from steps_on_request import Side, serve

from research.config import command_line
from research.core.errors import UserError
from research.models.families.family_registry import to_hf_config
from research.models.presets import preset

BENCH = Path(__file__).resolve().parent
# The sides that --rivals takes, and their flags. Their own defaults are those without a
# further word in the name; the others show whether another setting is faster here.
# Without remat Tunix takes 19 GB for 8 x 512 tokens.
JAX_RIVALS = {
    "maxtext": ("--side=maxtext", "--scan", "--remat=full"),
    "maxtext-minimal": ("--side=maxtext", "--scan", "--remat=minimal"),
    "maxtext-unscanned": ("--side=maxtext", "--no-scan", "--remat=full"),
    "tunix": ("--side=tunix", "--remat=full"),
    "tunix-no-remat": ("--side=tunix", "--remat=none"),
}
TORCH_RIVALS = {
    "peft": ("--no-recompute",),
    "peft-recompute": ("--recompute",),
    "peft-bfloat16": ("--no-recompute", "--adapters=bfloat16"),
    "peft-recompute-bfloat16": ("--recompute", "--adapters=bfloat16"),
}
RIVALS = JAX_RIVALS | TORCH_RIVALS


def serve_ours(arguments: argparse.Namespace, rows: int, seq: int) -> None:
    """Our side: the step of configs/finetune_dolly.py."""
    import jax
    from random_step import RandomStep, read_config

    from research.parallel import runtime
    from research.plan import abstract_step
    from research.weights import parameter_paths

    changes = {
        "data.batch_size": rows,
        "data.microbatch_size": 0,
        "data.seq_len": seq,
        "lora.rank": arguments.rank,
        "model.dtype": "bfloat16",
    }
    config = read_config("configs/finetune_dolly.py", changes)
    runtime.start(config.runtime)
    architecture = abstract_step.find_architecture(config, arguments.preset)
    side = RandomStep(config, architecture, trained=1.0, documents=1)

    def step() -> float:
        side.run()
        return float(side.sums["means"]["loss"])

    about = {
        "trained": parameter_paths.count(side.state.params),
        "versions": {"jax": jax.__version__},
    }
    serve(step, about)


def commands(
    arguments: argparse.Namespace, rows: int, seq: int, shape: Path
) -> dict[str, list[str]]:
    """The command line of each side."""
    ours = [sys.executable, str(BENCH / "jax_rivals.py"), f"--serve={rows}x{seq}"]
    ours += [f"--preset={arguments.preset}", f"--rank={arguments.rank}"]
    settings = [f"--shape={shape}", f"--rows={rows}", f"--seq={seq}"]
    settings += [f"--rank={arguments.rank}"]
    by_jax = [arguments.rivals_python, str(BENCH / "jax_rival_side.py"), *settings]
    by_torch = [arguments.torch_python, str(BENCH / "peft_side.py"), *settings]
    by_torch += [f"--micro={arguments.peft_rows or rows}", "--device=cpu", "--serve"]
    return {"ours": ours} | {
        name: [*(by_jax if name in JAX_RIVALS else by_torch), *RIVALS[name]]
        for name in arguments.rivals.split(",")
    }


def measure(
    arguments: argparse.Namespace, rows: int, seq: int, variables: Mapping[str, str]
) -> dict[str, Any]:
    """The seconds of each side's steps, by its name, in the order of the rounds."""
    sides: list[Side] = []
    about: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / "config.json"
        shape.write_text(json.dumps(to_hf_config(preset(arguments.preset))))
        try:
            for name, command in commands(arguments, rows, seq, shape).items():
                sides.append(Side(name, command, variables))
                about[name] = sides[-1].about()
                for _ in range(arguments.warmup):
                    sides[-1].step()
                sides[-1].seconds.clear()
            for number in range(arguments.steps):
                first = number % len(sides)
                for side in sides[first:] + sides[:first]:
                    side.step()
        finally:
            for side in sides:
                side.close()
    for side in sides:
        step_s = statistics.median(side.seconds)
        result = (
            {"side": side.name, "rows": rows, "seq": seq}
            | about[side.name]
            | {
                "tokens_per_s": rows * seq / step_s,
                "seconds": [round(x, 3) for x in side.seconds],
                "memory_gb": side.last["memory_gb"],
                "loss": side.last["loss"],
            }
        )
        print(json.dumps(result), flush=True)
    return {side.name: side.seconds for side in sides}


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How many times as fast as each rival our side is: the median of the rounds."""
    ours = seconds["ours"]
    return {
        name: statistics.median(x / y for x, y in zip(theirs, ours, strict=True))
        for name, theirs in seconds.items()
        if name != "ours"
    }


def sizes(text: str) -> tuple[int, int]:
    """Rows and tokens of "4x256". Raises UserError: the text is something else."""
    rows, _, seq = text.partition("x")
    if not (rows.isdecimal() and seq.isdecimal() and int(rows) and int(seq)):
        raise UserError(f"--shapes has {text!r}: write rows x tokens as 4x256")
    return int(rows), int(seq)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rivals-python", default="", help="interpreter with maxtext and google-tunix")
    add("--torch-python", default="", help="interpreter with torch and PEFT")
    add(
        "--rivals", default="maxtext,tunix", help="with commas, of " + ", ".join(RIVALS)
    )
    add("--shapes", default="4x256,8x512", help="rows x tokens, with commas")
    add("--preset", default="smollm2-135m", help="shape of the model, a Llama")
    add("--rank", type=int, default=16)
    add("--peft-rows", type=int, default=0, help="of a pass of PEFT; 0: all")
    add("--steps", type=int, default=3, help="rounds that count")
    add("--warmup", type=int, default=2, help="steps that do not; the first compiles")
    add("--serve", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := {*arguments.rivals.split(",")} - {*RIVALS}:
        raise UserError(
            f"--rivals has {', '.join(sorted(unknown))}: there are {', '.join(RIVALS)}"
        )
    chosen = {*arguments.rivals.split(",")}
    if not arguments.serve and chosen & {*JAX_RIVALS} and not arguments.rivals_python:
        raise UserError(
            "--rivals-python is empty: run `make bench-rivals`, or name an interpreter "
            "that has maxtext, google-tunix and qwix"
        )
    if chosen & {*TORCH_RIVALS} and not arguments.torch_python:
        raise UserError(
            "--torch-python is empty: name an interpreter that has torch, transformers "
            "and peft, such as .venv-torch/bin/python after `make bench`"
        )
    return arguments


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv[1:])
    if arguments.serve:
        serve_ours(arguments, *sizes(arguments.serve))
        return
    tunables = ALLOCATORS["huge pages"]
    variables = {"JAX_PLATFORMS": "cpu", **os.environ, "GLIBC_TUNABLES": tunables}
    for rows, seq in map(sizes, arguments.shapes.split(",")):
        for name, ratio in ratios(measure(arguments, rows, seq, variables)).items():
            print(f"{rows} x {seq}: {ratio:.2f} times {name}'s tokens/s", flush=True)


if __name__ == "__main__":
    command_line.run(main)
