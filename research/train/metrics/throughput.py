"""How fast a run trains: the FLOPs of a step and the clock of its steps."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

from research.models.architecture import Architecture
from research.models.transformer import Model
from research.weights import parameter_paths
from research.weights.trainable import Trainable


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs that the mathematics of a training step needs, not what the program spends.

    A product with a frozen matrix of P parameters costs 2P forward and 2P for the
    gradient of its input. A trained matrix costs 2P more for its own gradient.
    Recomputation and padding do not count, and the head counts only where the loss has
    weight (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, adjusted for LoRA and
    packing).

    Attributes:
      per_token: for a real token, without the head and attention.
      per_weight: for the head, per trained token.
      per_pair: for attention scores and mixing, per (query, key) pair.
    """

    per_token: float
    per_weight: float
    per_pair: float

    def step(self, tokens: float, weight: float, pairs: float) -> float:
        """FLOPs of one update."""
        return (
            self.per_token * tokens + self.per_weight * weight + self.per_pair * pairs
        )


def count_used(params: Mapping[str, Any], model: Model) -> int:
    """The scalars of `params`, by path, that a token meets: not all experts."""
    experts, used = model.architecture.experts, 0
    for path, leaf in params.items():
        count = parameter_paths.count(leaf)
        if experts and "expert" in model.specs[path].axes:
            count = count * experts.chosen // experts.count
        used += count
    return used


def count_trained(
    params: Mapping[str, Any], split: Trainable, model: Model
) -> dict[str, Any]:
    """The arguments of `count_flops` for a run that trains `params`.

    A whole matrix costs its own gradient more than a frozen one, which is a third of
    all that the factors of an adapter cost.
    """
    full = not split.frozen_specs
    whole = {
        path: model.specs[path]
        for path in split.full
        if model.specs[path].n_in and model.specs[path].stacked
    }
    factors = count_used(split.adapters(params), model)
    return {
        "trained": factors + count_used(whole, model) // 3,
        "full": full,
        "head": full or not split.full.isdisjoint(model.head(model.specs)),
    }


def count_flops(
    architecture: Architecture, trained: int, *, full: bool, head: bool | None = None
) -> FlopCount:
    """Counts FLOPs where `trained` scalars train, by `count_trained`.

    `full`: the whole model trains; `head`: the head does, by default as the model.
    """
    a = architecture
    body = a.layers * a.used_per_layer
    trains_head = full if head is None else head
    return FlopCount(
        per_token=6.0 * body if full else 4.0 * body + 6.0 * trained,
        per_weight=(6.0 if trains_head else 4.0) * a.vocab * a.embed,
        per_pair=12.0 * a.layers * a.heads * a.head_dim,
    )


class Clock:
    """Seconds spent in steps: `elapsed` in all, `last` in the last one."""

    def __init__(self, elapsed: float = 0.0):
        self.elapsed = elapsed
        self.last = 0.0
        self._mark = time.perf_counter()

    def resume(self) -> None:
        """Starts the next step now: the time since the last tick was no step."""
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The time in this context is no part of a step."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - begun

    def tick(self) -> None:
        """Counts the time since the last tick as a step."""
        now = time.perf_counter()
        self.last = now - self._mark
        self.elapsed += self.last
        self._mark = now


class SharedClock(Clock):
    """The clock of one run among `runs`, which share the steps of a pack equally."""

    def __init__(self, pack: Clock, runs: int, elapsed: float):
        super().__init__(elapsed)
        self._pack, self._runs = pack, runs

    def tick(self) -> None:
        """Adds this run's share of the pack's last step."""
        self.last = self._pack.last / self._runs
        self.elapsed += self.last
