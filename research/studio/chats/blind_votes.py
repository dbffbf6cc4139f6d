"""Votes on answers whose models were not named, and how often each model won."""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.json_files import read_json_lines
from research.runs.utc_clock import utc_now
from research.studio.chats.conversation_files import append_lines

NAME = "votes.jsonl"
LARGEST = 64 << 20  # bytes
CANDIDATE = {"name": str, "fingerprint": str}
VOTE = {
    "time": str,
    "chat": str,
    "answers": str,
    "prompt": str,
    "candidates": [CANDIDATE],
    "winner": str,
}
Z = statistics.NormalDist().inv_cdf(0.975)  # of a 95 % interval


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often a model won.

    Attributes:
      name, fingerprint: of the model; another step of a run is another model.
      votes, wins, ties: how many it took part in, won, and shared.
      prompts: different prompts among the votes.
      rate: the mean over prompts of what it got: 1 for a win, and a tie is shared.
      low, high: the 95 % interval of `rate`.
      chance: what `rate` would be if nobody could tell the models apart.
    """

    name: str
    fingerprint: str
    votes: int
    wins: int
    ties: int
    prompts: int
    rate: float
    low: float
    high: float
    chance: float

    @property
    def verdict(self) -> str:
        """The interval in words."""
        if self.low > self.chance:
            return "preferred"
        return "not preferred" if self.high < self.chance else "cannot be told yet"


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate among `count` (Wilson 1927, score interval)."""
    spread = Z * math.sqrt(rate * (1 - rate) / count + Z * Z / (4 * count * count))
    middle = rate + Z * Z / (2 * count)
    scale = 1 + Z * Z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def win_rates(votes: Sequence[Mapping[str, Any]]) -> list[WinRate]:
    """The rates of all models, the best first.

    Several votes on one prompt say little more than one of them, so they count as one:
    intervals are those of as many votes as there are prompts.
    """
    got: dict[tuple[str, str], list[tuple[str, float, float]]]
    got = collections.defaultdict(list)
    for vote in votes:
        models = [(x["name"], x["fingerprint"]) for x in vote["candidates"]]
        share = 1 / len(models)
        for model in models:
            won = float(model[0] == vote["winner"]) if vote["winner"] else share
            got[model].append((vote["prompt"], won, share))
    found = []
    for (name, fingerprint), each in got.items():
        by_prompt = collections.defaultdict(list)
        for prompt, won, _ in each:
            by_prompt[prompt].append(won)
        rate = statistics.fmean(map(statistics.fmean, by_prompt.values()))
        low, high = wilson(rate, len(by_prompt))
        wins = sum(won == 1 for _, won, _ in each)
        ties = sum(0 < won < 1 for _, won, _ in each)
        chance = statistics.fmean(share for _, _, share in each)
        counts = (len(each), wins, ties, len(by_prompt))
        found.append(WinRate(name, fingerprint, *counts, rate, low, high, chance))
    return sorted(found, key=lambda one: (-one.rate, one.name))


class BlindVotes:
    """The votes of a folder."""

    def __init__(self, folder: Path):
        self.path = folder / NAME

    def add(
        self, chat: str, answers: Mapping[str, Any], prompt: str, winner: str, by: str
    ) -> None:
        """Appends a vote. Raises OSError.

        Args:
          chat: id of the conversation.
          answers: its line.
          prompt: what makes two prompts one, such as their text.
          winner: a model of the answers; "" for a tie.
          by: who voted.
        """
        candidates = [
            {
                "name": column["model"],
                "fingerprint": str(column["stamp"].get("fingerprint", "")),
                "step": column["stamp"].get("step"),
            }
            for column in answers["columns"]
        ]
        vote = {"time": utc_now(), "chat": chat, "answers": answers["id"]}
        vote |= {"prompt": prompt, "candidates": candidates, "winner": winner}
        vote |= {"settings": answers["settings"], "by": by}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_lines(self.path, json.dumps(vote).encode() + b"\n", LARGEST)

    def read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """All votes, and the numbers of lines that are none."""
        votes, bad = read_json_lines(self.path, VOTE)
        return [x for x in votes if len(x["candidates"]) > 1], bad
