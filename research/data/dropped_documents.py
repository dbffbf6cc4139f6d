"""The documents of a source that are dropped: all are counted, and the first named."""

import dataclasses
from collections.abc import Mapping, Sequence

# This holds for each reason. So memory and files stay small, whatever is dropped, and a
# frequent reason does not hide a rare one.
MOST_NAMED = 100


@dataclasses.dataclass(frozen=True)
class DroppedDocuments:
    """Dropped documents by reason.

    Attributes:
      counts: how many there are.
      named: `file:line: why` of the first `MOST_NAMED`. Caches of older versions name
        none.
    """

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    named: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, line: str) -> None:
        """Adds one document, of which `line` says `file:line: why`."""
        self.include({reason: 1}, {reason: [line]})

    def include(
        self, counts: Mapping[str, int], named: Mapping[str, Sequence[str]]
    ) -> None:
        """Adds documents that were counted elsewhere and follow those in here."""
        for reason, count in counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        for reason, lines in named.items():
            own = self.named.setdefault(reason, [])
            own += lines[: MOST_NAMED - len(own)]

    def lines(self) -> list[str]:
        """A line for each named document, and one for the others of each reason."""
        found: list[str] = []
        for reason, count in self.counts.items():
            own = self.named.get(reason, [])
            found += own
            if more := count - len(own):
                found.append(f"and {more:,} more: {reason}")
        return found

    def __str__(self) -> str:
        """`2 empty, 1 not UTF-8`."""
        return ", ".join(f"{n:,} {why}" for why, n in self.counts.items())


def join_sources(by_name: Mapping[str, DroppedDocuments]) -> DroppedDocuments:
    """Those of all sources, each with the name of its source if there are several."""
    joined = DroppedDocuments()
    for name, dropped in by_name.items():
        start = f"{name}: " if len(by_name) > 1 else ""
        named = {k: [start + x for x in v] for k, v in dropped.named.items()}
        joined.include(dropped.counts, named)
    return joined
