"""Keys and values of prompts, from the pass over whole rows that gives their losses.

A row begins with its prompt, so the pass that measures its loss has read the prompt.
The engine gets the result, and reads no prompt a second time.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import psutil

from research.engine.requests import Request
from research.engine.slot_programs import CacheBlock
from research.evaluate.measuring.evaluated_models import EvaluatedModel
from research.evaluate.measuring.kept_lines import Key
from research.parallel.memory_limits import memory_limit

# The share of the host's memory for all prompts. The engine reads those beyond it.
SHARE = 0.25
# Keys and values on their way to the host may take this share of a device's memory.
# Both are shares of all memory, as what is free differs from one start to the next.
DEVICE_SHARE = 1 / 16


@dataclasses.dataclass
class PromptKeys:
    """Keys and values by model and row, until the engine has them.

    Attributes:
      prompts: ids of the prompts that are kept, but for the last one.
      found: what was computed of them.
    """

    prompts: Mapping[Key, tuple[int, ...]]
    found: dict[Key, CacheBlock] = dataclasses.field(default_factory=dict)

    @classmethod
    def planned(
        cls,
        requests: Mapping[str, Mapping[str, Request]],
        models: Sequence[EvaluatedModel],
        known: Mapping[Key, object],
        room: float | None = None,
    ) -> "PromptKeys":
        """Chooses the prompts: those that have room, and whose answers are not `known`.

        The choice by room does not depend on `known`, so that an evaluation that
        continues reads each prompt as it would have done before. A model has none if
        the keys of its batches have no room on a device, or if it has LongRoPE, which
        turns keys by the length of the row that they are in.

        Args:
          requests: by model and row.
          models: that answer.
          known: the answers of before.
          room: bytes; by default `SHARE` of the memory of the host or container.
        """
        if room is None:
            room = SHARE * min(psutil.virtual_memory().total, memory_limit())
        prompts = {}
        for model in models:
            each = _bytes_of_token(model) if _fits_devices(model) else 0
            for row, request in requests[model.name].items():
                room -= each * len(request.prompt)
                if each and room >= 0 and (model.name, row) not in known:
                    prompts[model.name, row] = request.prompt[:-1]
        return cls(prompts)

    def wants(self, model: str) -> bool:
        """Whether a prompt of `model` is missing."""
        return any(x[0] == model and x not in self.found for x in self.prompts)

    def lacks(self, key: Key, ids: Sequence[int]) -> bool:
        """Whether this prompt is missing, and a row of `ids` begins as it does."""
        prompt = () if key in self.found else self.prompts.get(key, ())
        return bool(prompt) and [*prompt[:1]] == [*ids[:1]]

    def take(
        self, key: Key, ids: np.ndarray, k_LTKH: np.ndarray, v_LTKH: np.ndarray
    ) -> None:
        """Keeps the prompt's part of what a model computed of a row, `ids`.

        A row whose context was cut begins with a part of its prompt; the engine reads
        the rest.
        """
        prompt = self.prompts.get(key, ())
        shared = min(len(prompt), len(ids))
        differs = np.flatnonzero(ids[:shared] != np.array(prompt[:shared], ids.dtype))
        if count := int(differs[0]) if len(differs) else shared:
            self.found[key] = CacheBlock(
                *(_cache_block(x[:, :count]) for x in (k_LTKH, v_LTKH))
            )


def _bytes_of_token(model: EvaluatedModel) -> int:
    """Bytes of keys and values; 0 if they depend on more than the tokens before."""
    a, dtype = model.run.base.architecture, model.run.config.model.dtype
    if any(rope and rope.scaling.kind == "longrope" for rope in a.ropes):
        return 0
    return 2 * a.layers * a.kv_heads * a.head_dim * jax.numpy.dtype(dtype).itemsize


def _fits_devices(model: EvaluatedModel) -> bool:
    """Whether keys and values of two batches fit; each device has them whole."""
    data, unit = model.run.config.data, jax.device_count()
    rows = -(-data.rows_per_pass // unit) * unit  # As many as any mesh needs.
    # A base and one that was trained on it are read together.
    needed = 2 * 2 * rows * data.seq_len * _bytes_of_token(model)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    # A CPU reports none: its limit is that of the host.
    limit = min(x.get("bytes_limit", math.inf) for x in stats)
    return needed <= DEVICE_SHARE * limit


def _cache_block(x_LTKH: np.ndarray) -> np.ndarray:
    """`[L, T, K, H]` as `[L, 1, K, T, H]`, in memory of its own."""
    # NumPy moves integers ten times as fast as bfloat16.
    as_numbers = x_LTKH.view(f"u{x_LTKH.dtype.itemsize}")
    moved = np.ascontiguousarray(as_numbers.transpose(0, 2, 1, 3))
    return moved.view(x_LTKH.dtype)[:, None]
