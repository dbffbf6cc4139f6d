"""Text to ids on all cores, with the reading of text beside it."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from research.tokenize.tokenizer import Tokenizer

Item = TypeVar("Item")

# Enough pieces for each core, and little next to what a model takes: the library
# keeps about a hundred bytes a token until a batch is converted.
BATCH_BYTES = (1 << 20) * min(max(os.cpu_count() or 1, 2), 32)
# Two at a time, so that no core waits for the longest piece of a batch.
WORKERS = 2


def encoded(
    items: Iterable[Item],
    text_of: Callable[[Item], str],
    tokenizer: Tokenizer,
    dtype: Any,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[tuple[Item, np.ndarray]]:
    """Each item with the ids of its text, in order, a few batches ahead.

    The library encodes without Python's lock and on all cores; meanwhile the next
    texts are read and the last ids are used.
    """
    waiting: collections.deque[tuple[list[Item], Future[list[np.ndarray]]]]
    waiting = collections.deque()
    pool = ThreadPoolExecutor(WORKERS, "encode")
    try:
        for batch in _batches(items, text_of, batch_bytes):
            texts = [text_of(item) for item in batch]
            job = pool.submit(tokenizer.encode_arrays, texts, dtype)
            waiting.append((batch, job))
            if len(waiting) > WORKERS:
                done, job = waiting.popleft()
                yield from zip(done, job.result(), strict=True)
        while waiting:
            done, job = waiting.popleft()
            yield from zip(done, job.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(
    items: Iterable[Item], text_of: Callable[[Item], str], batch_bytes: int
) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(text_of(item))
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
