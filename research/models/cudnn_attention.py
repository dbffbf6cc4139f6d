"""NVIDIA's fused attention of packed rows: documents by their places, or as a mask.

A mask costs two bytes for each pair of tokens, which every layer reads, and cuDNN
computes the pairs between documents, too. With the places of documents it does
neither. JAX has that layout in a function that is not public, and a call takes a fixed
number of documents a row; so rows with more of them, and JAX or GPUs without the
layout, keep the mask. Axis letters: see `attention.py`.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

# A row of T tokens may have T // 512 or T // 128 documents, or else needs the mask.
# cuDNN starts its blocks for as many documents as are allowed, and those without
# tokens end at once; hence the smaller number, which most rows of text keep to. With
# the larger one the statistics of 32 heads are half as large as a mask.
TOKENS_PER_DOCUMENT = (512, 128)


def lack_of_places(capability: str) -> str:
    """Why cuDNN cannot take the places of documents here; empty where it can."""
    if int(capability.partition(".")[0]) < 9:
        return f"their places need compute capability 9.0, this GPU has {capability}"
    try:
        known = inspect.signature(_fused().dot_product_attention).parameters
    except (ImportError, AttributeError):
        known = {}
    if not {"q_offsets", "kv_offsets", "mask_type"} <= {*known}:
        return f"JAX {jax.__version__} does not take their places"
    return ""


def bounds(length: int) -> list[int]:
    """The numbers of documents for which rows of `length` have a form of their own."""
    # One document a row is another layout of cuDNN; two cost hardly more.
    return [n for n in (length // t for t in TOKENS_PER_DOCUMENT) if n > 1]


def _fused():
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def masked(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    offset: int | Array = 0,
    reach: Array | None = None,
) -> Array:
    """Attention with documents as a mask; see `attention_kernels.packed_attention`.

    `reach` is `ScoreRule.reach`.

    `jax.nn.dot_product_attention` has no segments; its sequence lengths describe one
    document for each row. The mask becomes an additive `[B, 1, T, S]` in the dtype of
    the queries. It starts as booleans so that it gets no gradient (JAX 0.10 makes one).
    """
    length = q_BTNH.shape[1]
    # The backward pass of a masked call accepts only even lengths.
    q, q_segments = pad_tokens(2, q_BTNH, q_segments_BT)
    k, v, k_segments = pad_tokens(2, k_BSKH, v_BSKH, k_segments_BS)
    mask_BTS = q_segments[:, :, None] == k_segments[:, None, :]
    # cuDNN can skip the upper triangle, but only one that starts at the first key.
    triangle = isinstance(offset, int) and offset == 0
    index_T1 = (offset + jnp.arange(q.shape[1]))[:, None]
    index_1S = jnp.arange(k.shape[1])[None, :]
    if not triangle:
        mask_BTS &= (index_T1 >= index_1S)[None]
    if reach is not None:
        mask_BTS &= (index_T1 - index_1S < reach)[None]
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask_BTS[:, None],
        is_causal=triangle,
        implementation="cudnn",
    )
    return mixed[:, :length]


def pad_tokens(multiple: int, *arrays: Array) -> list[Array]:
    """Pads `[B, T, ...]` to a multiple of tokens with copies of the last one.

    A copy of the last query sees the key of the last query, so that no row of scores is
    masked entirely. A copied key stands after every real query.
    """
    return [
        jnp.pad(
            x,
            [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2),
            mode="edge",
        )
        for x in arrays
    ]


def document_numbers(segments_BT: Array) -> Array:
    """0, 1, ... for the documents of a row in their order, padding as one of them."""
    new = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(jnp.cumsum(new, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def document_places(segments_BT: Array, most: int) -> tuple[Array, Array]:
    """Lengths `[B, most]` and first tokens `[B, most + 1]` of the documents of a row.

    Both are int32 and end with -1 where a row has fewer than `most`, as
    `jax._src.cudnn.fused_attention_stablehlo.dot_product_attention` wants them. No row
    may have more.
    """
    numbers = document_numbers(segments_BT)[:, :, None]
    counted = numbers == jnp.arange(most)[None, None]
    lengths = jnp.sum(counted, axis=1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
    lengths, starts = (jnp.where(lengths > 0, x, -1) for x in (lengths, starts))
    return lengths, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)


def _placed(q_BTNH, k_BTKH, v_BTKH, segments_BT, *, most: int) -> Array:
    fused = _fused()
    lengths, starts = document_places(segments_BT, most)
    return fused.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, None, None, lengths, lengths, starts, starts,
        scale=q_BTNH.shape[-1] ** -0.5, mask_type=fused.MaskType.PADDING_CAUSAL,
    )  # fmt: skip


def _of_whole_rows(q_BTNH, k_BTKH, v_BTKH, segments_BT) -> Array:
    return masked(q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT)


def _by_count(run: Callable, segments_BT: Array, *arrays: Array):
    """`run(form, *arrays)` with the cheapest form that holds the rows' documents."""
    allowed = bounds(segments_BT.shape[1])
    forms = [functools.partial(_placed, most=n) for n in allowed] + [_of_whole_rows]
    most = 1 + document_numbers(segments_BT)[:, -1].max()
    chosen = jnp.sum(most > jnp.array(allowed), dtype=jnp.int32)
    return jax.lax.switch(
        chosen, [functools.partial(run, form) for form in forms], *arrays
    )


def _over_members(run: Callable) -> Callable:
    """`run` of arrays `[B, ...]`; under `vmap`, one call with the rows of all members.

    JAX has no batching rule for places, and `vmap` would compute all forms.
    """
    mapped = jax.custom_batching.custom_vmap(run)

    @mapped.def_vmap
    def at_once(size, batched, *arrays):
        whole = [
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(arrays, batched, strict=True)
        ]
        found = mapped(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        return (
            jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found),
            jax.tree.map(lambda _: True, found),
        )

    return mapped


@_over_members
def _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT) -> Array:
    arrays = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    return _by_count(lambda form, *x: form(*x), segments_BT, *arrays)


@_over_members
def _backward(q_BTNH, k_BTKH, v_BTKH, segments_BT, d_BTNH) -> tuple[Array, ...]:
    def run(form, *arrays):
        *inputs, segments, d_output = arrays
        return jax.vjp(lambda *x: form(*x, segments), *inputs)[1](d_output)

    return _by_count(run, segments_BT, q_BTNH, k_BTKH, v_BTKH, segments_BT, d_BTNH)


# The backward pass computes the output again: a fifth of its work. The forms keep
# different values, and `switch` would keep those of all forms, the mask too.
@jax.custom_vjp
def placed(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array) -> Array:
    """Causal attention within the documents of whole rows, by their places.

    Equal segments of a row must lie side by side.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT)


placed.defvjp(
    lambda *arrays: (_forward(*arrays), arrays),
    lambda arrays, d_output: (*_backward(*arrays, d_output), None),
)
