"""The train step of a model with experts against a dense one of the same active size.

    python tests/bench/experts.py --experts=8 --chosen=2

Both train in full on the same random rows, on one device, and take turns, so that other
work on the machine slows both. A turn is two steps, of which the second counts: as in
training it follows one of the same model, and finds its memory in place. The dense
model's MLP is as wide as the chosen experts together, so each token meets as many
matrices. Prints the medians and their ratio, also of the seconds of all the process's
threads: on a busy machine these say more. On CPU set the GLIBC_TUNABLES of the
Makefile, as `make` does for training.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

from random_step import RandomStep, add_knobs, knobs_of, read_config

from research.config import command_line
from research.models.architecture import Experts
from research.models.presets import preset
from research.parallel import runtime


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="llama-6m", help="the dense model")
    add("--experts", type=int, default=8, help="of a layer")
    add("--chosen", type=int, default=2, help="for each token")
    add("--rows", type=int, default=8, help="of a step")
    add("--seq", type=int, default=256, help="tokens of a row")
    add("--steps", type=int, default=15, help="of each side that count")
    add("--warmup", type=int, default=2, help="steps that do not count")
    add_knobs(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv[1:])
    changes = {
        "data.batch_size": options.rows,
        "data.seq_len": options.seq,
        **knobs_of(options.knob),
    }
    config = read_config("configs/pretrain_tiny.py", changes)
    runtime.start(config.runtime)
    dense = preset(options.preset)
    mixed = dataclasses.replace(
        dense,
        family="mixtral",
        mlp=dense.mlp // options.chosen,
        experts=Experts(options.experts, options.chosen, balance_weight=0.01),
    )
    sides = {
        name: RandomStep(config, shape, trained=1.0, documents=1)
        for name, shape in (("dense", dense), ("experts", mixed))
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(options.warmup + options.steps):
        for name, step in sides.items():
            step.run()
            begun = time.process_time()
            taken[name].append((step.run(), time.process_time() - begun))
    print(
        f"{options.preset}, {options.rows} x {options.seq} tokens, "
        f"{config.model.dtype}, {options.chosen} of {options.experts} experts"
    )
    for what, index in (("seconds", 0), ("of all threads", 1)):
        dense_s, experts_s = (
            statistics.median(each[index] for each in taken[name][options.warmup :])
            for name in sides
        )
        ratio = experts_s / dense_s
        print(f"{what}: dense {dense_s:.3f}, experts {experts_s:.3f}, {ratio:.2f}")


if __name__ == "__main__":
    command_line.run(main)
