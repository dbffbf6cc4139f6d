"""The size of a product with the vocabulary head follows the device."""

import types

import numpy as np
import pytest

from research.parallel.chips import CHIPS
from research.tasks.head_chunk import CPU_CHUNK, head_chunk
from research.tasks.token_loss_and_metrics import CrossEntropy


def mesh(platform, kind, tensor=1):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return types.SimpleNamespace(
        devices=np.array([[device] * tensor], object), shape={"tensor": tensor}
    )


@pytest.mark.parametrize(
    ("platform", "kind", "vocab", "tensor", "chunk"),
    [
        ("cpu", "cpu", 128256, 1, 128),
        # By the ratio of FLOP to bytes, 295, and by a sixteenth of the memory.
        ("gpu", "NVIDIA H100 80GB HBM3", 32000, 1, 4096),
        ("gpu", "NVIDIA H100 80GB HBM3", 262144, 1, 2048),
        ("gpu", "NVIDIA H100 80GB HBM3", 262144, 2, 4096),
        ("tpu", "TPU v5 lite", 128256, 1, 1024),
        ("gpu", "A card of tomorrow", 32000, 1, 4096),
        ("gpu", "A card of tomorrow", 10**8, 1, 128),
    ],
)
def test_the_chunk_follows_the_device_and_the_vocabulary(
    platform, kind, vocab, tensor, chunk
):
    assert head_chunk(vocab, mesh(platform, kind, tensor)) == chunk


def test_no_chip_gives_more_than_a_sixteenth_of_its_memory_to_a_chunk():
    for chip in CHIPS.values():
        for vocab in (32000, 128256, 262144):
            found = head_chunk(vocab, mesh(chip.platform, chip.kinds[0]))
            assert found & (found - 1) == 0 and found >= CPU_CHUNK
            assert 6 * found * vocab <= chip.hbm / 16


def test_a_chunk_of_the_config_is_taken_as_it_is():
    here = mesh("gpu", "NVIDIA H100 80GB HBM3")
    assert CrossEntropy(1, 96, mesh=here).positions(32000) == 96
    assert CrossEntropy(1, 0, mesh=here).positions(32000) == 4096
