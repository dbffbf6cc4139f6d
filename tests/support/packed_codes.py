"""Writes matrices in codes by the words of their formats; nothing of `research`."""

import json

import numpy as np


def words(codes, places, axis):
    """int32 words of eight codes along `axis`; `places[i]` is the code at bit 4 i."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    grouped = codes.reshape(*codes.shape[:-1], -1, 8)
    made = np.zeros(grouped.shape[:-1], np.uint32)
    for bits, place in enumerate(places):
        made |= grouped[..., place] << np.uint32(4 * bits)
    return np.ascontiguousarray(np.moveaxis(made, -1, axis)).view(np.int32)


def draw(rng, shape, group):
    """Codes `[out, in]`, zeros and scales `[out, groups]`, and what they stand for."""
    out, inputs = shape
    codes = rng.integers(0, 16, shape)
    zeros = rng.integers(1, 16, (out, inputs // group))
    scales = rng.uniform(0.001, 0.01, zeros.shape).astype(np.float16)
    where = np.arange(inputs) // group
    return codes, zeros, scales, where


def pack_awq(name, shape, rng, group=8):
    codes, zeros, scales, where = draw(rng, shape, group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return weights(codes, zeros, scales, where), {
        f"{name}.qweight": words(codes.T, order, 1),
        f"{name}.qzeros": words(zeros.T, order, 1),
        f"{name}.scales": scales.T.copy(),
    }


def pack_gptq(name, shape, rng, group=8, act_order=False, with_groups=True):
    codes, zeros, scales, where = draw(rng, shape, group)
    where = rng.permutation(where) if act_order else where
    named = {f"{name}.g_idx": where.astype(np.int32)} if with_groups else {}
    return weights(codes, zeros, scales, where), named | {
        f"{name}.qweight": words(codes.T, range(8), 0),
        f"{name}.qzeros": words(zeros.T - 1, range(8), 1),
        f"{name}.scales": scales.T.copy(),
    }


def weights(codes, zeros, scales, where):
    """Each number for itself in Python, rounded to float16 as torch does."""
    exact = (codes - zeros[:, where]) * scales.astype(np.float64)[:, where]
    return exact.astype(np.float16)


def pack_bitsandbytes(name, shape, rng, levels, nested=True, dtype="float16"):
    """`levels` are those of nf4. Blocks of 64 run on from row to row."""
    count = shape[0] * shape[1]
    codes = rng.integers(0, 16, count + count % 2)
    blocks = -(-count // 64)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": shape}
    parts = {"": (codes[::2] * 16 + codes[1::2]).astype(np.uint8)[:, None]}
    if nested:
        bytes_ = rng.integers(0, 256, blocks).astype(np.uint8)
        shared = rng.uniform(0.01, 0.1, -(-blocks // 256)).astype(np.float32)
        curve = np.linspace(-1, 1, 256, dtype=np.float32)
        offset = 0.2
        scales = np.array(
            [curve[b] * shared[i // 256] for i, b in enumerate(bytes_)], np.float32
        ) + np.float32(offset)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = offset
        parts |= {".absmax": bytes_, ".nested_absmax": shared}
        parts[".nested_quant_map"] = curve
    else:
        scales = rng.uniform(0.01, 0.1, blocks).astype(np.float32)
        parts[".absmax"] = scales
    parts[".quant_map"] = np.array(levels, np.float32)
    described = np.frombuffer(json.dumps(state).encode(), np.uint8)
    parts[".quant_state.bitsandbytes__nf4"] = described
    found = parts[".quant_map"][codes[:count]] * scales[np.arange(count) // 64]
    made = {f"{name}.weight{end}": np.ascontiguousarray(x) for end, x in parts.items()}
    return found.astype(dtype).reshape(shape), made
