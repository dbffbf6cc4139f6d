"""A source of text in shares of about equal size, each to be read without the others.

The deal depends on the source and on the rows of a batch, never on the processes.
"""

import heapq
from typing import NamedTuple

from research.data.text.document_readers import SourceFile, TextSource
from research.parallel.mesh import divisors

# More processes than this share their reading. One process that reads all shares needs
# a file handle and some text of each.
MOST_SHARES = 64
PARTS_PER_SHARE = 64
PART_BYTES = 16 << 20  # No part of a file is smaller, and no share either.
# The smallest share as a part of the largest. Rows are drawn from all shares alike, so
# a smaller one would repeat earlier.
BALANCE = 0.8


class Deal(NamedTuple):
    """How a source is dealt.

    Attributes:
      count: of shares.
      part_bytes: files are divided into parts of about this size; 0: not divided.
    """

    count: int
    part_bytes: int


UNDIVIDED = Deal(1, 0)


def choose_deal(source: TextSource, rows: int, part_bytes: int = PART_BYTES) -> Deal:
    """The most shares that divide the `rows` of a batch and hold about equally much.

    Args:
      source: what is dealt.
      rows: of a global batch.
      part_bytes: at least this much text is in a share, and in a part of a file.
    """
    total = sum(item.size for item in source.files)
    for count in sorted(divisors(rows, MOST_SHARES), reverse=True):
        if count == 1 or (not source.revision and total < count * part_bytes):
            continue
        smaller = max(part_bytes, total // (count * PARTS_PER_SHARE))
        for deal in dict.fromkeys((Deal(count, 0), Deal(count, smaller))):
            sizes = [sum(map(_size, share)) for share in deal_shares(source, deal)]
            if min(sizes) >= BALANCE * max(sizes):
                return deal
    return UNDIVIDED


def deal_shares(source: TextSource, deal: Deal) -> list[list[SourceFile]]:
    """The files, or parts of files, of each share, in the order of the source.

    Each goes to the share that has the least so far.
    """
    if deal == UNDIVIDED:
        return [list(source.files)]
    shares: list[list[SourceFile]] = [[] for _ in range(deal.count)]
    filled = [(0, number) for number in range(deal.count)]
    for item in source.units:
        parts = item.size // deal.part_bytes if deal.part_bytes else 1
        for part in source.parts(item, parts):
            size, number = heapq.heappop(filled)
            shares[number].append(part)
            heapq.heappush(filled, (size + _size(part), number))
    return shares


def _size(item: SourceFile) -> int:
    return max(item.size, 1)  # All shards of a hub dataset count alike.
