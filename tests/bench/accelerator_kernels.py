"""Each attention kernel that works here against the plain one in float32.

    python tests/bench/accelerator_kernels.py

Outputs and gradients of packed rows in bfloat16, of heads as Llama 3.1 8B has them. A
kernel is wrong where it is further from the plain one, which computes in float32 from
the same values, than bfloat16 explains; the exit code is 1 then. Its milliseconds are
those of a forward and a backward pass, the median of several after a warm-up.
"""

import argparse
import datetime
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from random_rows import random_rows

from research.config import command_line
from research.core.errors import UserError
from research.models.attention_kernels import KERNELS, choose, packed_attention

# bfloat16 keeps 8 bits; a sum over a row of products of rounded values stays within
# some of them. The tests hold every kernel to the same share of the largest value.
TOLERANCE = 2e-2
NAMES = "output", "dq", "dk", "dv"
BLOCK = 128

Arrays = tuple[jax.Array, ...]


def draw(arguments: argparse.Namespace) -> tuple[Arrays, jax.Array]:
    """Queries, keys, values and the output's gradient in bfloat16; and segments."""
    rng = np.random.default_rng(0)
    rows = arguments.rows, arguments.seq
    counts = arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads
    drawn = tuple(
        jnp.asarray(rng.normal(size=(*rows, n, arguments.width)), jnp.bfloat16)
        for n in counts
    )
    segments = random_rows(rows, 2, documents=arguments.documents)["segments"]
    return drawn, jnp.asarray(segments)


@functools.partial(jax.jit, static_argnames="kernel")
def both_passes(drawn: Arrays, segments: jax.Array, *, kernel: str) -> Arrays:
    """The output and the gradients of queries, keys and values."""
    *inputs, d_output = drawn

    def attention(*qkv: jax.Array) -> jax.Array:
        return packed_attention(*qkv, segments, segments, kernel=kernel, block=BLOCK)

    output, backward = jax.vjp(attention, *inputs)
    return output, *backward(d_output)


def distance(found: jax.Array, exact: jax.Array) -> float:
    """The largest difference as a share of the largest exact value."""
    difference = np.abs(np.asarray(found, np.float32) - np.asarray(exact))
    return float(difference.max() / np.abs(exact).max())


def milliseconds(drawn: Arrays, segments: jax.Array, kernel: str, times: int) -> float:
    seconds = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        jax.block_until_ready(both_passes(drawn, segments, kernel=kernel))
        seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds[1:])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=2)
    add("--seq", type=int, default=2048, help="tokens of a row")
    add("--documents", type=int, default=3, help="of each row")
    add("--heads", type=int, default=32)
    add("--kv_heads", type=int, default=8)
    add("--width", type=int, default=128, help="of a head")
    add("--times", type=int, default=10, help="passes that are timed")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv[1:])
    device = jax.devices()[0]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{now}, {device.device_kind}, JAX {jax.__version__}")
    print(f"python {shlex.join(sys.argv)}\n")
    drawn, segments = draw(arguments)
    # Also on devices whose float32 products are of fewer bits by default.
    with jax.default_matmul_precision("highest"):
        wide = tuple(x.astype(jnp.float32) for x in drawn)
        exact = [np.asarray(x) for x in both_passes(wide, segments, kernel="xla")]
    print("| kernel |", " | ".join(NAMES), "| ms | |")
    print("|---" * (len(NAMES) + 3) + "|")
    wrong = []
    for kernel in KERNELS:
        try:
            choose(
                kernel,
                device.platform,
                dtype=jnp.bfloat16,
                head_dim=arguments.width,
                length=arguments.seq,
                capability=str(getattr(device, "compute_capability", "0.0")),
            )
        except UserError as error:
            reason = str(error).partition(": ")[2].partition(";")[0]
            print(f"| {kernel} |{' |' * (len(NAMES) + 1)} not here: {reason} |")
            continue
        found = both_passes(drawn, segments, kernel=kernel)
        off = [distance(*pair) for pair in zip(found, exact, strict=True)]
        # Not `>`: what is not a number is wrong as well.
        if not max(off) <= TOLERANCE or not np.isfinite(off).all():
            wrong.append(kernel)
        took = milliseconds(drawn, segments, kernel, arguments.times)
        verdict = "WRONG" if kernel in wrong else "right"
        cells = " | ".join(f"{value:.1e}" for value in off)
        print(f"| {kernel} | {cells} | {took:.2f} | {verdict} |", flush=True)
    print(f"\nlimit of a difference: {TOLERANCE:.0%} of the largest value")
    return int(bool(wrong))


if __name__ == "__main__":
    command_line.run(main)
