"""LoRA over a base in codes against LoRA over the same base in bfloat16.

    python tests/bench/quantised_base.py --data=dolly-15k.jsonl.gz

The real model, real rows and the real step, see `step_sides.py`. A side is a value of
`config.model.quantize`, then a `/` before each entry of `config.model.quantize_paths`,
and a `+` before the `config.lora.kind`: `nf4/down_proj=int8/v_proj=int8+qera`; `int8*`
is int8 with `config.model.int8_products`.
Prints for each the seconds of a step (median), its speed against the first side, its
CPU seconds against those of the first side (median of the pairs of steps), the
bytes of the frozen weights, those that the compiled step holds beside its arguments,
and the held-out loss before the first and after the last step: by how much it is above
that of the first side, with one standard error of that over the held-out batches.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

from step_sides import Side, add_flags, read_sides, speed, train_in_turn

from research.config import command_line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--sides", default="none,int8,nf4",
        help="with commas between: FORMAT, each with /PATTERN=FORMAT for some "
        "matrices, and +KIND of adapters")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv[1:])
    sides = {}
    for side in arguments.sides.split(","):
        forms, plus, kind = side.partition("+")
        form, *others = forms.split("/")
        own: dict[str, Any] = {"model.quantize": form.removesuffix("*")}
        own |= {"model.quantize_paths": tuple(others)}
        own |= {"lora.kind": kind} if plus else {}
        own |= {"model.int8_products": True} if form.endswith("*") else {}
        sides[side] = own
    configs = read_sides(arguments, sides)
    report(*train_in_turn(configs, measures=True), arguments.warmup)


def report(sides: Sequence[Side], batch: Any, warmup: int) -> None:
    first = sides[0]
    for side in sides:
        start, end = map(against, side.losses, first.losses)
        pairs = zip(side.cpu_seconds[warmup:], first.cpu_seconds[warmup:], strict=True)
        cpu = statistics.median(x / y for x, y in pairs)
        print(
            f"{side.name:8} {speed(first.seconds[warmup:], side.seconds[warmup:])}, "
            f"CPU seconds {cpu:.2f}, loaded in {side.load_s:.1f} s, "
            f"frozen {side.frozen_bytes / 1e6:.1f} MB "
            f"({side.frozen_bytes / first.frozen_bytes:.3f}), "
            f"temporary {side.temporary_bytes(batch) / 1e6:.0f} MB, held-out loss "
            f"{start} -> {end}",
            flush=True,
        )


def against(own: list[tuple[float, int]], first: list[tuple[float, int]]) -> str:
    """A held-out loss, and by how much it is above that of the first side."""
    tokens = sum(count for _, count in own)
    base = sum(loss * count for loss, count in first) / tokens
    above = [(x - y) * n for (x, n), (y, _) in zip(own, first, strict=True)]
    mean = sum(above) / tokens
    errors = (x - mean * n for x, (_, n) in zip(above, own, strict=True))
    error = math.sqrt(sum(x**2 for x in errors)) / tokens
    return f"{base + mean:.4f} ({mean / base:+.2%} +- {error / base:.2%})"


if __name__ == "__main__":
    command_line.run(main)
