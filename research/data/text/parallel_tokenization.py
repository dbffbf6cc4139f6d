"""Tokenises on all cores while the next texts are read."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from research.tokenize.tokenizer import Tokenizer

Item = TypeVar("Item")

# Enough pieces for every core. The library keeps about a hundred bytes a token until
# a batch is converted, so this stays small beside a model.
BATCH_BYTES = (1 << 20) * min(max(os.cpu_count() or 1, 2), 32)
# Two batches at a time, so that no core waits for the longest piece of one.
WORKERS = 2


def encoded(
    items: Iterable[Item],
    text_of: Callable[[Item], str],
    tokenizer: Tokenizer,
    dtype: Any,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[tuple[Item, np.ndarray]]:
    """Yields each item with the ids of its text, in order, a few batches ahead.

    The library encodes on all cores without Python's lock. Meanwhile this thread reads
    the next texts, and the caller uses the last ids.
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
