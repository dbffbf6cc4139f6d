"""The numbers of a server's `/metrics` that a page shows."""

import collections
import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.serve.api.prometheus_text import PREFIX

SAMPLE = re.compile(rf"{PREFIX}(\w+)(?:\{{.*\}})? (\S+)")


def totals(text: str) -> dict[str, float]:
    """The sum over all labels of each counter, gauge, and sum and count."""
    found: dict[str, float] = collections.defaultdict(float)
    for line in text.splitlines():
        sample = SAMPLE.fullmatch(line)
        if sample and not sample[1].endswith("_bucket"):
            with contextlib.suppress(ValueError):  # Another program wrote no number.
                value = float(sample[2])
                found[sample[1]] += value if math.isfinite(value) else 0.0
    return found


def figures_of(text: str, slots: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures since the start of a server; a page subtracts two for those of now.

    Args:
      text: of `/metrics`.
      slots: of `/slots`.
    """
    found = totals(text)
    return {
        "slots": len(slots),
        "busy": sum(bool(slot.get("is_processing")) for slot in slots),
        "waiting": found["num_requests_waiting"],
        "answers": found["e2e_request_latency_seconds_count"],
        "seconds": found["e2e_request_latency_seconds_sum"],
        "firsts": found["time_to_first_token_seconds_count"],
        "first_seconds": found["time_to_first_token_seconds_sum"],
        "tokens": found["generation_tokens_total"],
        "refused": found["request_refused_total"],
    }
