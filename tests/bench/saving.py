"""Measure the cost of checksums: a state of the size of SmolLM2's, saved and restored.

    python tests/bench/saving.py --mb=58      # LoRA of rank 16, moments included
    python tests/bench/saving.py --mb=1614    # all parameters, moments included

Medians of several rounds. `blocked` is what a training step waits for, `written` until
the commit; `sealed` is the checksums' share of that, and `checked` of a restore.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from research.checkpoints import checksums
from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import CheckpointConfig


def make_state(megabytes: int) -> dict[str, jax.Array]:
    """Sixteen arrays of random bits, which no compression makes smaller."""
    rng = np.random.default_rng(0)
    rows = megabytes * 1_000_000 // 16 // 4096
    return {
        f"array{i}": jnp.asarray(rng.standard_normal((rows, 1024), np.float32))
        for i in range(16)
    }


def timed(function) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def one_round(state, abstract) -> dict[str, float]:
    """Seconds of one save and one restore, and of the checksums in both."""
    folder, sealing = Path(tempfile.mkdtemp()), []
    seal = checksums.seal
    checksums.seal = lambda path: sealing.append(timed(lambda: seal(path)))
    try:
        with Checkpointer(folder, CheckpointConfig(), {}) as checkpointer:
            blocked = timed(lambda: checkpointer.save(1, state, {}, None))
            written = blocked + timed(checkpointer.wait)
            checked = timed(lambda: checkpointer.damage(1))
            restored = timed(lambda: checkpointer.restore(abstract))
    finally:
        checksums.seal = seal
        shutil.rmtree(folder)
    return {
        "blocked": blocked,
        "written": written,
        "sealed": sum(sealing),
        "restored": restored,
        "checked": checked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=58)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    state = make_state(options.mb)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    rounds = [one_round(state, abstract) for _ in range(options.rounds)]
    median = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in median.items())
    print(f"{options.mb} MB: {shown}")
    print(
        f"checksums: {median['sealed'] / median['written']:.1%} of a save, "
        f"{median['checked'] / median['restored']:.1%} of a restore"
    )


if __name__ == "__main__":
    main()
