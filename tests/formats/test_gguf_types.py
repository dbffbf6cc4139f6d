"""Which number format a tensor gets, and how far its numbers move."""

import gguf
import numpy as np
import pytest

from research.core.errors import UserError
from research.formats.gguf import gguf_file
from research.formats.gguf.block_layouts import LAYOUTS
from research.formats.gguf.tensor_types import (
    TYPES,
    stored_bytes,
    tensor_type,
    to_type,
)

F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
Q8_0 = gguf.GGMLQuantizationType.Q8_0
ODD = ("blk.0.ffn_up.weight", (64, 40))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("output_norm.weight", (64,)),
        ("blk.0.attn_q_norm.weight", (2, 64)),
        ("blk.0.ffn_gate_inp.weight", (8, 64)),
        ("position_embd.weight", (128, 64)),
        ("blk.0.attn_q.bias", (64,)),
        ("blk.0.attn_q.weight.lora_a", (2, 64)),
    ],
)
def test_small_tensors_stay_exact(name, shape):
    assert {tensor_type(name, shape, wanted) for wanted in TYPES.values()} == {F32}


def test_rows_that_no_block_divides_are_half_precision():
    assert tensor_type(*ODD, "Q8_0") == tensor_type(*ODD, "Q4_0") == F16
    assert tensor_type(*ODD, "BF16").name == "BF16"
    assert tensor_type("token_embd.weight", (96, 64), "Q8_0") == Q8_0


@pytest.mark.parametrize("wanted", TYPES.values())
def test_the_error_is_at_most_half_a_step(wanted):
    """A step is a 127th of a block's largest number in Q8_0, an 8th in Q4_0."""
    kind = gguf.GGMLQuantizationType[wanted]
    rows = np.random.RandomState(3).standard_normal((8, 96)).astype(np.float32)
    rows[0, :32] = 0.0
    stored = to_type("x.weight", rows, kind)
    assert stored.nbytes == stored_bytes(rows.shape, kind)
    error = np.abs(gguf.dequantize(stored, kind).reshape(rows.shape) - rows)
    largest = np.abs(rows.reshape(8, 3, 32)).max(-1)
    allowed = {
        "F32": 0.0, "F16": 2**-11, "BF16": 2**-8,
        # The scale of a block is itself a float16.
        "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8 + 2**-11,
    }[wanted]  # fmt: skip
    assert (error.reshape(8, 3, 32).max(-1) <= allowed * largest).all()
    assert wanted == "F32" or error.max() > 0


@pytest.mark.parametrize(
    "value, wanted, said",
    [
        (np.nan, "F32", "not finite"),
        (np.inf, "Q8_0", "not finite"),
        (1e6, "F16", "too large for F16"),
        (1e7, "Q8_0", "too large for Q8_0"),
    ],
)
def test_a_number_that_does_not_fit_is_named(value, wanted, said):
    tensor = np.full((1, 32), value, np.float32)
    with pytest.raises(UserError, match=f"blk.1.x.weight holds .*{said}"):
        to_type("blk.1.x.weight", tensor, gguf.GGMLQuantizationType[wanted])


@pytest.mark.parametrize("name", [*LAYOUTS, "F32", "F16", "BF16"])
@pytest.mark.parametrize("rows", [1, 37, 64])
def test_blocks_that_are_regrouped_give_the_numbers_of_the_library(
    name, rows, monkeypatch
):
    kind = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    # Small bytes, so that no scale is infinite.
    stored = np.random.RandomState(3).randint(0, 60, (rows, 3 * size), np.uint8)
    monkeypatch.setattr(gguf_file, "AT_ONCE", 4096)  # So the last group is a part.
    found = gguf_file._dequantize(stored, kind)
    expected = gguf.dequantize(stored, kind)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.ravel(), expected.ravel())
