"""Differences of logits, added up over pieces of the vocabulary.

So neither the logits of all ids nor a whole head is in memory at once.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Sums = Mapping[str, Any]
LOWEST = -1e30


def no_sums(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The sums before the first piece, for tokens of this shape."""
    zero, low = np.zeros(shape, np.float32), np.full(shape, LOWEST, np.float32)
    names = ("run", "run2", "files", "files2", "same", "same2", "change", "change2")
    sums = dict.fromkeys((*names, "z", "kl", "z_files"), zero)
    sums |= dict.fromkeys(("most", "most_files", "above", "below"), low)
    return sums | dict.fromkeys(("best", "best_files"), np.zeros(shape, np.int32))


@jax.jit
def add_piece(
    sums: Sums, run: Array, files: Array, same: Array, other: Array, start: Array
) -> dict[str, Array]:
    """The sums with another piece of logits, `[B, T, n]` each.

    Args:
      sums: so far, `[B, T]` each.
      run: of the model of the run.
      files: of the model in the files.
      same: of the model that the files' must equal.
      other: of the one whose difference from the run's is what may change.
      start: the id of the piece's first logit.
    """
    new = dict(sums)
    pairs = {
        "run": run,
        "files": files - run,
        "same": files - same,
        "change": other - run,
    }
    for name, value in pairs.items():
        new[name] += value.sum(-1)
        new[f"{name}2"] += (value**2).sum(-1)
    apart = files - run
    new["above"] = jnp.maximum(sums["above"], apart.max(-1))
    new["below"] = jnp.maximum(sums["below"], (-apart).max(-1))
    for name, logits in (("", run), ("_files", files)):
        before, here = sums[f"most{name}"], logits.max(-1)
        new[f"best{name}"] = jnp.where(
            here > before,
            start + logits.argmax(-1).astype(jnp.int32),
            sums[f"best{name}"],
        )
        new[f"most{name}"] = jnp.maximum(before, here)
        shrunk = jnp.exp(before - new[f"most{name}"])
        powers = jnp.exp(logits - new[f"most{name}"][..., None])
        new[f"z{name}"] = sums[f"z{name}"] * shrunk + powers.sum(-1)
        if not name:
            new["kl"] = sums["kl"] * shrunk - (powers * apart).sum(-1)
    return new


@jax.jit
def measures(sums: Sums, is_token: Array, ids: Array) -> dict[str, Array]:
    """Numbers over the real tokens, by the names of the fields of `Parity`.

    Args:
      sums: of all pieces.
      is_token: `[B, T]`, whether it is one.
      ids: how many there are in the vocabulary.
    """

    def norm(name: str) -> Array:
        """That of logits, their mean taken off."""
        spread = sums[f"{name}2"] - sums[name] ** 2 / ids
        return jnp.sqrt(jnp.maximum(spread, 0.0))

    own = norm("run")

    def median(name: str) -> Array:
        share = jnp.where(own > 0, norm(name) / own, norm(name))
        ordered = jnp.sort(jnp.where(is_token, share, jnp.inf).ravel())
        return ordered[(is_token.sum() - 1) // 2]

    mean = sums["files"] / ids
    apart = jnp.maximum(sums["above"] - mean, sums["below"] + mean)
    logs = {
        end: sums[f"most{end}"] + jnp.log(sums[f"z{end}"]) for end in ("", "_files")
    }
    kl = sums["kl"] / sums["z"] - logs[""] + logs["_files"]
    kl = jnp.where(is_token, kl, 0.0)
    same = is_token & (sums["best"] == sums["best_files"])
    return {
        "logits": median("same"),
        "changed": median("change"),
        "largest": jnp.max(jnp.where(is_token, apart, 0.0)),
        "kl": kl.sum() / is_token.sum(),
        "largest_kl": kl.max(),
        "agreement": same.sum() / is_token.sum(),
        "peak": jnp.max(jnp.where(is_token, jnp.abs(sums["most"]), 0.0)),
    }
