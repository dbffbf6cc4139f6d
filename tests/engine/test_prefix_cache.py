"""Prompt beginnings are found by content, and the oldest leave."""

import numpy as np

from research.engine.prefix_cache import PrefixCache, chunk_keys

KIB = 1024


def block(value):
    return np.full(KIB, value, np.uint8)


def filled(capacity, *chains):
    cache = PrefixCache(capacity)
    for keys in chains:
        cache.add(keys, lambda i, keys=keys: block(i))
    return cache


def test_a_key_stands_for_the_adapter_and_for_all_ids_so_far():
    ids = list(range(12))
    keys = chunk_keys("", ids, 4)
    assert len(keys) == 3 and len({*keys}) == 3
    # A tail that fills no chunk has no key.
    assert chunk_keys("", [*ids, 99], 4) == keys
    assert chunk_keys("", [*ids[:8], 0, 0, 0, 0], 4)[:2] == keys[:2]
    changed = chunk_keys("", [7, *ids[1:]], 4)
    assert not {*changed} & {*keys}
    assert not {*chunk_keys("another adapter", ids, 4)} & {*keys}
    # Ids of other widths do not run into each other.
    assert chunk_keys("", [1, 0], 1)[1] != chunk_keys("", [1 << 32, 0], 1)[1]


def test_the_longest_known_beginning_is_found():
    keys = chunk_keys("", range(12), 4)
    cache = filled(10 * KIB, keys[:2])
    assert [b[0] for b in cache.find(keys)] == [0, 1]
    assert cache.find(chunk_keys("", range(1, 13), 4)) == []


def test_it_stays_within_its_bytes_and_keeps_what_was_used_last():
    old, new = chunk_keys("", range(8), 4), chunk_keys("", range(50, 58), 4)
    cache = filled(3 * KIB, old)
    held = cache.find(old)
    cache.add(new, lambda i: block(i))
    assert cache.nbytes == 3 * KIB
    # The end of the older chain left, and its beginning is still of use.
    assert len(cache.find(new)) == 2 and len(cache.find(old)) == 1
    assert held[1][0] == 1
    cache.find(old)
    cache.add(chunk_keys("", range(90, 98), 4), lambda i: block(i))
    assert len(cache.find(old)) == 1 and len(cache.find(new)) == 0


def test_a_chain_longer_than_the_cache_keeps_its_beginning():
    keys, read = chunk_keys("", range(40), 4), []

    def one(index):
        read.append(index)
        return block(index)

    cache = PrefixCache(3 * KIB)
    cache.add(keys, one)
    assert len(cache.find(keys)) == 3 and cache.nbytes == 3 * KIB
    assert read == [0, 1, 2, 3]  # The others are not even read.
    cache.add(keys, one)
    assert read == [0, 1, 2, 3, 3]


def test_without_room_nothing_is_kept():
    keys = chunk_keys("", range(8), 4)
    assert filled(0, keys).find(keys) == []
