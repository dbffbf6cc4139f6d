"""A run keeps the ends of some held-out rows, on which its exports are compared."""

import json

import numpy as np

from research.data.token_batch import Batch
from research.runs.lineage.proof_rows import FILE, find_rows, keep_rows


def make_batch(lengths, size):
    """Rows of one document each, padded; a token is 1000 * row + its place."""
    places = np.tile(np.arange(size, dtype=np.int32), (len(lengths), 1))
    real = places < np.array(lengths)[:, None]
    tokens = np.where(real, places + 1000 * np.arange(len(lengths))[:, None], 0)
    zeros = np.zeros_like(tokens)
    return Batch(tokens, zeros, zeros, real.astype(np.int32), places * real, zeros)


def kept(folder, lengths, size):
    keep_rows(folder, make_batch(lengths, size))
    return find_rows(folder, None)


def test_the_longest_row_is_kept_to_its_end_and_the_ends_of_others(tmp_path):
    rows = kept(tmp_path, [100, 700, 30, 0, 600], 700)
    assert rows.tokens.shape == (2, 512)
    assert rows.tokens[0].tolist() == [*range(1188, 1700)]
    assert rows.positions[0].tolist() == [*range(188, 700)]
    assert rows.tokens[1, :64].tolist() == [*range(36, 100)]
    assert rows.tokens[1, 64:94].tolist() == [*range(2000, 2030)]
    assert not rows.segments[1, 94:128].any()
    assert rows.tokens[1, 128:192].tolist() == [*range(4536, 4600)]
    numbers = rows.segments[1]
    assert len({numbers[0], numbers[64], numbers[128]}) == 3
    assert not numbers[192:].any() and rows.segments[0].all()


def test_short_rows_are_kept_whole(tmp_path):
    rows = kept(tmp_path, [5, 3], 8)
    assert rows.tokens.tolist() == [[0, 1, 2, 3, 4], [1000, 1001, 1002, 0, 0]]
    assert kept(tmp_path, [4], 8).segments.tolist() == [[1] * 4, [0] * 4]


def test_rows_of_an_earlier_version_are_read(tmp_path):
    """It kept the beginnings of four rows."""
    old = {name: [[1, 2], [3, 4]] for name in ("tokens", "positions", "segments")}
    (tmp_path / FILE).write_text(json.dumps(old))
    assert find_rows(tmp_path, None).tokens.tolist() == [[1, 2], [3, 4]]
