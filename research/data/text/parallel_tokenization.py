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
    shared_pool: ThreadPoolExecutor | None = None,
) -> Iterator[tuple[Item, np.ndarray]]:
    """Yields each item with the ids of its text, in order, a few batches ahead.

    The library encodes on all cores without Python's lock. Meanwhile this thread reads
    the next texts, and the caller uses the last ids.

    Args:
      items: any values.
      text_of: the text of one.
      tokenizer: encodes them.
      dtype: of the ids.
      batch_bytes: about so much text is encoded at a time.
      shared_pool: threads of the caller; by default this call has its own.
    """
    waiting: collections.deque[tuple[list[Item], Future[list[np.ndarray]]]]
    waiting = collections.deque()
    pool = shared_pool or ThreadPoolExecutor(WORKERS, "encode")
    batches = _batches(items, text_of, batch_bytes)
    failure: Exception | None = None
    try:
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                # Earlier items can still be used.
                failure, batch = error, None
            if batch is None:
                break
            texts = [text_of(item) for item in batch]
            waiting.append((batch, pool.submit(tokenizer.encode_arrays, texts, dtype)))
            if len(waiting) > WORKERS:
                done, job = waiting.popleft()
                yield from zip(done, job.result(), strict=True)
        while waiting:
            done, job = waiting.popleft()
            yield from zip(done, job.result(), strict=True)
        if failure:
            raise failure
    finally:
        if not shared_pool:
            pool.shutdown(cancel_futures=True)


def _batches(
    items: Iterable[Item], text_of: Callable[[Item], str], batch_bytes: int
) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    try:
        for item in items:
            batch.append(item)
            size += len(text_of(item))
            if size >= batch_bytes:
                yield batch
                batch, size = [], 0
    except Exception:
        yield batch
        raise
    if batch:
        yield batch
