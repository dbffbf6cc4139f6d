"""The roofline of a training step on random rows, and where its time goes.

    python tests/bench/roofline.py --config=configs/pretrain_tiny.py --rows=8

First table: the matrix products of a step by kind, each timed alone by shape on this
machine, the bytes that they move at the speed of a copy, and the seconds that the step
takes above them. Second table: a profile of the step by operation, without `perf`.
Seconds are CPU seconds of all threads on a CPU, where other work on the machine then
matters less, and seconds of the device on an accelerator. On CPU set the GLIBC_TUNABLES
of the Makefile, as `make` does for training.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
from random_step import RandomStep, make_parser, name_of, read_flags
from step_products import Product, products_of
from traced_operations import group_of, lanes, profile

from research.config import command_line
from research.parallel import runtime
from research.plan.abstract_step import optimizer_bytes
from research.plan.compiled import hlo_text
from research.weights import parameter_paths

# Each product is timed so often, for at least so long; the fastest counts.
ROUNDS, LEAST_SECONDS = 5, 0.03
COPIED_BYTES = 2**28


def spent() -> float:
    """Seconds that this process has used: of its CPUs, or of the accelerator."""
    if jax.devices()[0].platform == "cpu":
        return time.process_time()
    return time.perf_counter()


def seconds_of(call: Callable[[int], Any]) -> float:
    """Seconds of one repetition of `call(repetitions)`, the best of some rounds."""
    jax.block_until_ready(call(1))
    times, found = 1, []
    while len(found) < ROUNDS:
        begun = spent()
        jax.block_until_ready(call(times))
        seconds = spent() - begun
        if seconds < LEAST_SECONDS:
            times *= 4
        else:
            found.append(seconds / times)
    return min(found)


def product_seconds(product: Product, dtype: str) -> float:
    """Seconds of one such product, computed again and again inside one program."""
    left, right = product.factors(dtype)

    @jax.jit
    def repeat(left, right, times):
        def once(_, carry):
            # With the barrier, no factor is known to be the same in every round.
            left, right, _ = jax.lax.optimization_barrier(carry)
            return left, right, product.compute(left, right)

        like = jax.eval_shape(product.compute, left, right)
        start = left, right, jnp.zeros(like.shape, like.dtype)
        return jax.lax.fori_loop(0, times, once, start)[2]

    return seconds_of(lambda times: repeat(left, right, times))


def copy_bytes_per_s(size: int) -> float:
    """Bytes read and written a second where a program copies an array of `size`."""
    x = jnp.ones(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)

    def call(times: int) -> Any:
        for _ in range(times):
            y = add(x)  # An earlier result frees its memory.
        return y

    return 2 * size / seconds_of(call)


@dataclasses.dataclass
class Row:
    """The least that a kind of work costs a step.

    Attributes:
      flops, nbytes: of a step.
      products: seconds of its products alone.
    """

    flops: float = 0.0
    nbytes: float = 0.0
    products: float = 0.0


def bound(
    products: Sequence[Product], seconds: Mapping[Product, float], dtype: str
) -> dict[str, Row]:
    """The rows of the first table by kind; `seconds` are those of `Product.alone`."""
    rows: dict[str, Row] = {}
    for product in products:
        row = rows.setdefault(product.kind, Row())
        row.flops += product.flops
        row.nbytes += product.nbytes(dtype)
        row.products += product.times * seconds[product.alone]
    return rows


def update_bytes(job: RandomStep) -> float:
    """Bytes of an update: weights and state are read and written, gradients read."""
    weights = parameter_paths.nbytes(job.state.params)
    gradients = 4 * parameter_paths.count(job.state.params)
    return gradients + 2 * (weights + optimizer_bytes(job.abstract))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table whose first column is text."""
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def describe_bound(
    rows: Mapping[str, Row], bandwidth: float, wall: float, used: float
) -> Iterator[str]:
    """The first table, and what the step takes above it.

    Args:
      rows: by kind.
      bandwidth: bytes of a copy in a second.
      wall: seconds from the beginning of a step to its end.
      used: seconds of a step by `spent`.
    """
    lines = []
    for kind, row in rows.items():
        rate = f"{row.flops / row.products / 1e9:,.0f}" if row.products else "-"
        copies = row.nbytes / bandwidth
        figures = f"{row.flops / 1e9:,.1f}", f"{row.nbytes / 1e9:.2f}", rate
        lines.append((kind, *figures, f"{row.products:.3f}", f"{copies:.3f}"))
    flops, nbytes, least = (
        sum(getattr(row, name) for row in rows.values())
        for name in ("flops", "nbytes", "products")
    )
    whole = f"{flops / 1e9:,.1f}", f"{nbytes / 1e9:.2f}", f"{flops / least / 1e9:,.0f}"
    lines.append(("all", *whole, f"{least:.3f}", f"{nbytes / bandwidth:.3f}"))
    head = "kind", "GFLOP", "GB", "GFLOP/s alone", "s of products", "s of a copy"
    yield from table(head, lines)
    yield (
        f"a copy moves {bandwidth / 1e9:.1f} GB/s; the step takes {used:.3f} s "
        f"({wall:.3f} s from begin to end), of which {max(0.0, 1 - least / used):.0%} "
        "are not the products"
    )


def describe_profile(
    found: Mapping[str, Sequence[float]],
    program: hlo_text.HloProgram,
    traces: int,
    wall: float,
    used: float,
    longest: int,
) -> Iterator[str]:
    """The second table, and the operations that take longest.

    Args:
      found: the seconds of each call by operation, of all traced steps.
      program: that was traced.
      traces: how many steps were.
      wall: seconds of a traced step.
      used: seconds of a step by `spent`, when it was not traced.
      longest: how many operations are listed.
    """
    groups: dict[str, list[float]] = {}
    for name, calls in found.items():
        groups.setdefault(group_of(name, program), []).extend(calls)
    busy = sum(map(sum, groups.values()))
    rows = [
        (name, f"{sum(calls) / busy:.1%}", f"{len(calls) / traces:,.0f}")
        for name, calls in sorted(groups.items(), key=lambda x: -sum(x[1]))
    ]
    yield from table(("operations", "share of the time", "calls in a step"), rows)
    busy /= traces
    idle = max(0.0, 1 - busy / (wall * lanes()))
    yield (
        f"{lanes()} at a time in {wall:.3f} s; {idle:.0%} of that is waiting;"
        f" all together they took {busy / used:.2f} times the {used:.3f} s, "
        "which other work on the machine raises"
    )
    for name, calls in sorted(found.items(), key=lambda x: -sum(x[1]))[:longest]:
        milliseconds, each = 1e3 * sum(calls) / traces, len(calls) / traces
        kind = group_of(name, program)
        yield f"{milliseconds:9.2f} ms {each:6,.0f} calls  {name} ({kind})"


def time_steps(job: RandomStep, warmup: int, steps: int) -> tuple[float, float]:
    """Medians of the seconds of a step, and of those by `spent`."""
    for _ in range(warmup):
        job.run()
    pairs = []
    for _ in range(steps):
        begun = spent()
        wall = job.run()
        pairs.append((wall, spent() - begun))
    wall, used = (statistics.median(x) for x in zip(*pairs, strict=True))
    return wall, used


def main(argv: Sequence[str]) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--traces", type=int, default=5, help="steps that are traced")
    add("--longest", type=int, default=0, help="operations to list; 0: none")
    arguments, config, shape = read_flags(parser, argv[1:])
    runtime.start(config.runtime)
    job = RandomStep(config, shape, arguments.trained, arguments.documents)
    wall, used = time_steps(job, arguments.warmup, arguments.steps)
    weight, pairs = float(job.sums["weight"]), float(job.sums["pairs"])
    products, dtype = products_of(job.abstract, weight, pairs), config.model.dtype
    alone = {product.alone: 0.0 for product in products}
    seconds = {product: product_seconds(product, dtype) for product in alone}
    rows = bound(products, seconds, dtype)
    rows["optimizer"] = Row(nbytes=update_bytes(job))
    print(f"{name_of(arguments)}, {dtype}, {jax.devices()[0].device_kind}")
    bandwidth = copy_bytes_per_s(COPIED_BYTES)
    print(*describe_bound(rows, bandwidth, wall, used), sep="\n", flush=True)
    found, wall = profile(job.run, arguments.traces)
    program = hlo_text.parse(job.compiled_text())
    figures = arguments.traces, wall, used, arguments.longest
    print(*describe_profile(found, program, *figures), sep="\n")


if __name__ == "__main__":
    command_line.run(main)
