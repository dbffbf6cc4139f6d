"""Rows that repeat count as one: which rows of a test file belong together."""

import unicodedata
from collections.abc import Sequence

from research.evaluate.answered_row import AnsweredRow


def clusters_of(rows: Sequence[AnsweredRow]) -> list[int]:
    """The number of each row's cluster, from 0 in the order of first rows.

    Rows are in one cluster if they have the same prompt, or the same question, context
    and references, but for case, width of characters and space. Their answers are not
    independent, so that a bootstrap over rows would make its interval too narrow.
    """
    parent = list(range(len(rows)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    first: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows):
        content = tuple(map(_plain, (row.question, row.context, *row.references)))
        keys = [("content", *content)] if any(content) else []
        keys += [("prompt", _plain(row.prompt))] if row.prompt.strip() else []
        for key in keys:
            other = root(first.setdefault(key, number))
            mine = root(number)
            parent[max(mine, other)] = min(mine, other)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(row), len(numbers)) for row in range(len(rows))]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
