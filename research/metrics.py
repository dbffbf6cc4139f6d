"""Numbers of a run: throughput, FLOPs, and the files they are written to."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from research import trees
from research.models.presets import Architecture


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs that a training step needs, whatever the program spends.

    A product with a frozen matrix of P parameters costs 2P forward and 2P for the
    gradient of its input; a trained one 2P more for its own gradient. Recomputation
    and padding are not counted, the head only where the loss has weight (Chowdhery
    et al. 2022, arXiv:2204.02311, appendix B, adjusted for LoRA and packing).

    Attributes:
      per_token: of everything a real token passes but the head and attention.
      per_weight: of the head, per trained token.
      per_pair: of attention scores and mixing, per (query, key) pair.
    """

    per_token: float
    per_weight: float
    per_pair: float

    def step(self, tokens: float, weight: float, pairs: float) -> float:
        """FLOPs of one update."""
        return (
            self.per_token * tokens + self.per_weight * weight + self.per_pair * pairs
        )


def count_flops(architecture: Architecture, trained: int, *, full: bool) -> FlopCount:
    """FLOPs for an architecture with `trained` scalars; `full`: all of the model."""
    a = architecture
    attention = 2 * a.embed * (a.heads + a.kv_heads) * a.head_dim
    body = a.layers * (attention + 3 * a.embed * a.mlp)
    head = a.vocab * a.embed
    return FlopCount(
        per_token=6.0 * body if full else 4.0 * body + 6.0 * trained,
        per_weight=(6.0 if full else 4.0) * head,
        per_pair=12.0 * a.layers * a.heads * a.head_dim,
    )


class Clock:
    """Seconds spent in steps, so far and in the last step."""

    def __init__(self, elapsed: float = 0.0):
        self.elapsed = elapsed
        self.last = 0.0
        self._mark = time.perf_counter()

    def resume(self) -> None:
        """What happened since the last tick was not a step."""
        self._mark = time.perf_counter()

    def tick(self) -> None:
        """A step ended now."""
        now = time.perf_counter()
        self.last = now - self._mark
        self.elapsed += self.last
        self._mark = now


class MetricsFile:
    """`metrics.jsonl` (one object a line, `step` in each) and TensorBoard files."""

    def __init__(self, folder: Path, first_step: int):
        """Opens both, forgetting what lies after `first_step` (a resumed run)."""
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        # From step 0 everything is done again, its evaluation too.
        kept = [x for x in read_metrics(folder) if 0 < first_step >= x["step"]]
        lines = [json.dumps(line) + "\n" for line in kept]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else 0
        )

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Appends `values` (numbers, or one dictionary of numbers deep)."""
        line = {"step": step, "kind": kind, **values}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        flat = trees.flatten(values)[0] if values else {}
        for name, value in flat.items():
            self._board.add_scalar(f"{kind}/{name}".replace(".", "/"), value, step)

    def sync(self) -> None:
        """Until what was written would outlive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()


def append_line(folder: Path, step: int, kind: str, values: dict[str, Any]) -> None:
    """To a `metrics.jsonl` that no run has open."""
    line = json.dumps({"step": step, "kind": kind, **values}, ensure_ascii=False)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line torn by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
