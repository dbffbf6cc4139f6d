"""LoRA over a base in codes against LoRA over the same base in bfloat16.

    python tests/bench/quantised_base.py --data=dolly-15k.jsonl.gz

The real model, real rows and the real step, see `step_sides.py`. Prints for each value
of `config.model.quantize` the seconds of a step (median), its speed against the first
side, the bytes of the frozen weights, those that the compiled step holds beside its
arguments, and the held-out loss before the first and after the last step.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from random_step import read_config, value_of
from step_sides import Side, speed, train_in_turn

from research.config import command_line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="configs/finetune_dolly.py")
    add("--data", default="", help="rows; by default those of the config")
    add("--sides", default="none,int8,nf4", help="values of config.model.quantize")
    add("--steps", type=int, default=20)
    add("--warmup", type=int, default=2, help="first steps, whose time does not count")
    add("--knob", action="append", default=[], metavar="PATH=VALUE")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv[1:])
    given = dict(pair.partition("=")[::2] for pair in arguments.knob)
    changes = {knob: value_of(text) for knob, text in given.items()}
    changes |= {"steps": arguments.steps}
    if arguments.data:
        changes["data.path"] = arguments.data
    configs = {
        side: read_config(arguments.config, changes | {"model.quantize": side})
        for side in arguments.sides.split(",")
    }
    report(*train_in_turn(configs, measures=True), arguments.warmup)


def report(sides: Sequence[Side], batch: Any, warmup: int) -> None:
    first = sides[0]
    for side in sides:
        start, end = side.losses
        print(
            f"{side.name:5} {speed(first.seconds[warmup:], side.seconds[warmup:])}, "
            f"loaded in {side.load_s:.1f} s, "
            f"frozen {side.frozen_bytes / 1e6:.1f} MB "
            f"({side.frozen_bytes / first.frozen_bytes:.3f}), "
            f"temporary {side.temporary_bytes(batch) / 1e6:.0f} MB, held-out loss "
            f"{start:.4f} -> {end:.4f} ({end / first.losses[-1] - 1:+.2%})",
            flush=True,
        )


if __name__ == "__main__":
    command_line.run(main)
