"""A hub without a network: datasets in shards, whose connection may drop."""

import sys
import types

from research.core import hub_access

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubDataset:
    """Rows in shards, as a streamed `datasets.IterableDataset` gives them.

    Attributes:
      drops: numbers of rows, counted over all reads, before which the connection drops.
      reads: how many rows were given.
    """

    def __init__(self, shards, drops=()):
        self.shards, self.drops, self.reads = shards, set(drops), 0
        self.num_shards = len(shards)

    def shard(self, count, index):
        assert count == self.num_shards
        return _Shard(self, self.shards[index])


class _Shard:
    def __init__(self, dataset, rows):
        self._dataset, self._rows, self._at = dataset, rows, 0

    def state_dict(self):
        return {"examples_iterable": {"shard_example_idx": self._at}}

    def load_state_dict(self, state):
        self._at = state["examples_iterable"]["shard_example_idx"]

    def __iter__(self):
        for row in self._rows[self._at :]:
            if self._dataset.reads in self._dataset.drops:
                self._dataset.drops.discard(self._dataset.reads)
                raise ConnectionResetError("the peer is gone")
            self._dataset.reads += 1
            self._at += 1
            yield row


def fake_hub(monkeypatch, dataset, commit=COMMIT):
    """Puts a hub in place whose only dataset this is; returns the calls."""
    asked = []

    def load_dataset(name, subset, **others):
        asked.append({**others, "name": name, "subset": subset})
        return dataset

    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset)
    )
    reply = hub_access.HubReply(commit, "")
    monkeypatch.setattr(hub_access, "ask_hub", lambda *_: reply)
    return asked
