"""How many positions go through the vocabulary head in one product.

Each product reads the head, and in full training it also reads and writes the head's
float32 gradient: about 14 bytes for each of its weights, against 6 FLOP for each weight
and position. A device whose peak is R FLOP for each byte that its memory moves spends a
tenth of the product on that at 23 R positions. The logits of a chunk and their gradient
take 6 bytes each.
"""

from jax.sharding import Mesh

from research.parallel import chips

# Measured on two cores of a CPU, whose R is about 5; larger chunks are no faster there.
CPU_CHUNK = 128
# R and bytes of accelerators that the table of chips does not know.
TYPICAL_RATIO, TYPICAL_BYTES = 200.0, 16e9
POSITIONS_PER_RATIO = 23
LOGIT_BYTES = 6
# Share of a device's memory that the logits of a chunk may take.
MOST_OF_MEMORY = 1 / 16


def head_chunk(vocab: int, mesh: Mesh) -> int:
    """Positions of each shard in one product with the head, for `model.loss_chunk=0`.

    A power of two, by the chip and by the logits that a device holds.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return CPU_CHUNK
    chip = chips.by_device_kind(device.device_kind)
    known = chip is not None and chip.hbm_bandwidth > 0
    ratio = chip.flops / chip.hbm_bandwidth if known else TYPICAL_RATIO
    room = MOST_OF_MEMORY * (chip.hbm if known else TYPICAL_BYTES)
    logits = room / LOGIT_BYTES * mesh.shape["tensor"]
    most = int(min(POSITIONS_PER_RATIO * ratio, logits / vocab))
    return max(CPU_CHUNK, 1 << (most.bit_length() - 1))
