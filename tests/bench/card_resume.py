"""Whether a training step that is resumed in another process gives the same bits."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from card_children import measurement
from card_job import Job
from card_trials import DETERMINISTIC

from research.train.step import train_step

Result = dict[str, Any]
# XLA_FLAGS by case. `--xla_gpu_deterministic_ops`, and programs that are compiled anew,
# gave the same bits as the second case on an H100: docs/measured.md.
CASES = {"no flag": "", "exclude_nondeterministic_ops": DETERMINISTIC}


def resume(
    preset: str = "llama-125m",
    steps: int = 8,
    rows: int = 8,
    seq: int = 1024,
    cases: Sequence[str] = tuple(CASES),
) -> Iterator[Result]:
    """Whether a second process, started from half way, gives the same bits.

    For each of `cases` one process trains `steps` steps and saves its state after half
    of them; another one starts from that state, with the compile cache that both share,
    as runs do. All cases run at the same time.
    """
    sizes = {"preset": preset, "steps": steps, "rows": rows, "seq": seq}
    with tempfile.TemporaryDirectory() as folder:
        halves: dict[str, list[Result]] = {case: [] for case in cases}
        for resumed in (False, True):
            children = {}
            for number, case in enumerate(cases):
                saved = str(Path(folder) / f"{number}.npz")
                children[case] = measurement(
                    "half",
                    {**sizes, "saved": saved, "resumed": resumed},
                    _shared_card(CASES[case], folder),
                )
            for case, child in children.items():
                halves[case] += [*child.results(), child.failure]
    for case, found in halves.items():
        yield {"case": case, **_compare(found)}


def _compare(found: list[Result]) -> Result:
    """Two halves, or why one failed."""
    for failure in found:
        if "failed" in failure:
            return failure
    whole, again = filter(None, found)
    common = whole["losses"][-len(again["losses"]) :]
    return {
        "exact": common == again["losses"] and whole["end"] == again["end"],
        "equal_losses": sum(map(str.__eq__, common, again["losses"])),
        "of": len(common),
        "equal_state": whole["end"] == again["end"],
        "losses": [float.fromhex(x) for x in whole["losses"]],
        "resumed": [float.fromhex(x) for x in again["losses"]],
    }


def _shared_card(flags: str, folder: str) -> dict[str, str]:
    """The environment of a process that shares the card with others."""
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), flags)))
    kept = {k: v for k, v in os.environ.items() if k != "XLA_CLIENT_MEM_FRACTION"}
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (
        {"XLA_FLAGS": flags} if flags else {}
    )
    return {"JAX_COMPILATION_CACHE_DIR": folder, **kept, **own}


def half(
    preset: str, steps: int, rows: int, seq: int, saved: str, resumed: bool
) -> Iterator[Result]:
    """All steps, or those after the state in `saved`: losses and the last state."""
    job = Job.make("full", preset, seq, rows // 2, 16)
    state, frozen = job.start()
    leaves, structure = jax.tree.flatten(state)
    if resumed:
        with np.load(saved) as file:
            found = [file[str(number)] for number in range(len(leaves))]
        state = structure.unflatten(
            jax.device_put(x, leaf.sharding)
            for x, leaf in zip(found, leaves, strict=True)
        )
    train = train_step.jit_train_step(job.definition)
    losses = []
    for number in range(steps // 2 if resumed else 0, steps):
        if number == steps // 2 and not resumed:
            arrays = map(np.asarray, jax.tree.leaves(state))
            np.savez(saved, **{str(i): x for i, x in enumerate(arrays)})
        batch = job.batch(rows, rows // 2, seq, seed=7919 * number, documents=3)
        state, sums = train(state, frozen, batch)
        losses.append(float(sums["means"]["loss"]).hex())
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    yield {"losses": losses, "end": digest.hexdigest()}
