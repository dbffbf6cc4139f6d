"""Test rows that the model has seen in training: equal prompts, long shared runs.

Only hashes of the test rows are held. Training texts pass by one at a time, so that a
training set of any size is read with the memory that the test rows take.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from research.evaluate.answer_metrics.words_of_text import words_of

# As in the GPT-3 paper (Brown et al. 2020, appendix C): runs of 13 words, and none that
# more than 10 training texts have, because those are instructions and boilerplate.
RUN = 13
MOST_TEXTS = 10
EXACT, WORDS = "exact", "words"
_ODD = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Overlap:
    """A test row that the training rows hold, in whole or in part.

    Attributes:
      id: of the test row.
      kind: `exact` if a training row asks the same, but for case, punctuation and
        space; else `words`: a training row shares a run of 13 words with it.
      training_place: where the first such training row was read.
      words: the run that is shared, or the beginning of the equal prompt.
    """

    id: str
    kind: str
    training_place: str
    words: str


class TrainingOverlap:
    """Finds out which of some test rows occur among training rows."""

    def __init__(self, test_rows: Mapping[str, tuple[str, str]]):
        """Hashes the test rows.

        Args:
          test_rows: by each row's id the text that is asked (question and context), and
            the expected answer. A text of pre-training has no answer.
        """
        self._ids = list(test_rows)
        self._rows_of_prompt: dict[int, list[int]] = {}
        runs, owners = [], []
        for number, (asked, expected) in enumerate(test_rows.values()):
            words = words_of(asked)
            if words:
                same = self._rows_of_prompt.setdefault(_hash(" ".join(words)), [])
                same.append(number)
            row_runs = np.unique(_run_hashes(words + words_of(expected)))
            runs.append(row_runs)
            owners.append(np.full(len(row_runs), number))
        hashes = np.concatenate([np.zeros(0, np.uint64), *runs])
        self._owners = np.concatenate([np.zeros(0, int), *owners])
        # Run i, sorted, is of the rows `_owners[_starts[i] : _starts[i + 1]]`.
        order = np.argsort(hashes, kind="stable")
        self._owners = self._owners[order]
        self._runs, self._starts = np.unique(hashes[order], return_index=True)
        self._counts = np.zeros(len(self._runs), np.int64)
        self._first: list[tuple[str, str] | None] = [None] * len(self._runs)
        self._equal: dict[int, tuple[str, str]] = {}

    def add(self, place: str, asked: str, expected: str = "") -> None:
        """Compares one training row, which was read at `place`."""
        words = words_of(asked)
        for number in self._rows_of_prompt.get(_hash(" ".join(words)), ()):
            self._equal.setdefault(number, (place, " ".join(words[:RUN])))
        words += words_of(expected)
        hashes = _run_hashes(words)
        if not len(hashes) or not len(self._runs):
            return
        spots = np.minimum(np.searchsorted(self._runs, hashes), len(self._runs) - 1)
        (starts,) = np.nonzero(self._runs[spots] == hashes)
        found, first = np.unique(spots[starts], return_index=True)
        self._counts[found] += 1
        for spot, start in zip(found, starts[first], strict=True):
            if self._counts[spot] == 1:
                self._first[spot] = (place, " ".join(words[start : start + RUN]))

    def found(self) -> list[Overlap]:
        """The test rows that overlap so far, in the order of the test rows."""
        shared: dict[int, tuple[str, str]] = {}
        (spots,) = np.nonzero((self._counts > 0) & (self._counts <= MOST_TEXTS))
        ends = np.append(self._starts[1:], len(self._owners))
        for spot in spots:
            for owner in self._owners[self._starts[spot] : ends[spot]]:
                shared.setdefault(int(owner), self._first[spot])
        return [
            Overlap(
                name,
                EXACT if number in self._equal else WORDS,
                *self._equal.get(number, shared.get(number)),
            )
            for number, name in enumerate(self._ids)
            if number in self._equal or number in shared
        ]


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _run_hashes(words: list[str]) -> NDArray[np.uint64]:
    """Hashes of the runs of 13 words, [len(words) - 12]: polynomials modulo 2^64."""
    hashes = np.array([_hash(word) for word in words], np.uint64)
    count = max(len(words) - RUN + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset in range(RUN):
        total = total * np.uint64(_ODD) + hashes[offset : offset + count]
    return total
