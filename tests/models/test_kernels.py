"""Every attention kernel computes what the formula says, wherever it runs.

No GPU and no TPU here: Splash runs in Pallas' interpreter; of cuDNN the very call is
made, with JAX's own plain implementation behind it; both are lowered for the real
platforms.
"""

import functools
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, close, in_soak
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import PartitionSpec

from research.config.knob_groups import MeshConfig, ModelConfig
from research.core.errors import UserError
from research.models import attention_kernels, cudnn_attention, make_model
from research.models.attention import PLAIN, ScoreRule
from research.models.attention_kernels import KERNELS, choose, packed_attention
from research.parallel import mesh as meshes

ROWS, LENGTH, WIDTH = 2, 300, 8
# Splash takes blocks of 128, of which the row has three, the last of them padded;
# as many as `xla` is given, and no document ends where a block does.
BLOCK = 128
DOCUMENTS = np.repeat([1, 2, 3, 0], [100, 43, 137, 20])
SEGMENTS = np.stack([DOCUMENTS, np.ones(LENGTH, np.int64)]).astype(np.int32)


@pytest.fixture(autouse=True)
def as_if_accelerated(monkeypatch):
    """Stand-ins for what this machine lacks: several Splash blocks, and cuDNN."""
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCK", 128)
    plain = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return plain(*args, implementation="xla", **kwargs)

    def at_places(
        q, k, v, bias, mask, q_seqlen, kv_seqlen, q_offsets, kv_offsets, *,
        scale, mask_type,
    ):  # fmt: skip
        assert bias is None and mask is None
        assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
        assert q_offsets.shape[1] == q_seqlen.shape[1] + 1
        assert mask_type is fused_attention_stablehlo.MaskType.PADDING_CAUSAL
        index = jnp.arange(q.shape[1])[None, :, None]
        begin = q_offsets[:, None, :-1]
        inside = (index >= begin) & (index < begin + q_seqlen[:, None]) & (begin >= 0)
        same = (inside[:, :, None] & inside[:, None]).any(-1)
        mixed = plain(
            q, k, v, mask=same[:, None], is_causal=True, scale=scale,
            implementation="xla",
        )  # fmt: skip
        # cuDNN writes nothing where there is no document.
        return jnp.where(inside.any(-1)[..., None, None], mixed, jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", at_places)
    monkeypatch.setattr(cudnn_attention, "TOKENS_PER_DOCUMENT", (140, 60))


def attend(kernel, *arrays, offset=0, block=BLOCK, rule=PLAIN):
    return packed_attention(
        *arrays, kernel=kernel, block=block, offset=offset, rule=rule, interpret=True
    )


def draw(heads, kv_heads, dtype=np.float32):
    """Queries, keys, values and the gradient of the output, all of whole rows."""
    rng = np.random.default_rng(3)
    counts = (heads, kv_heads, kv_heads, heads)
    drawn = (rng.normal(size=(ROWS, LENGTH, n, WIDTH)) for n in counts)
    return [jnp.asarray(x, dtype) for x in drawn]


@functools.partial(jax.jit, static_argnames=("kernel", "static", "block"))
def outputs_and_gradients(
    q, k, v, d_output, q_segments, k_segments, *,
    kernel, offset=0, static=None, block, rule=PLAIN,
):  # fmt: skip
    """Output and gradients of q, k, v; `offset` is traced unless `static` is given."""

    def attention(q, k, v):
        arrays = (q, k, v, q_segments, k_segments)
        at = offset if static is None else static
        return attend(kernel, *arrays, offset=at, block=block, rule=rule)

    output, backward = jax.vjp(attention, q, k, v)
    return output, *backward(d_output)


def formula(q, k, v, d_output, window=LENGTH, softcap=np.inf):
    """The same of whole rows in float64, all scores at once, heads one by one."""
    q, k, v, d_output = (np.asarray(x, np.float64) for x in (q, k, v, d_output))
    output, d_q = np.zeros_like(q), np.zeros_like(q)
    d_k, d_v = np.zeros_like(k), np.zeros_like(v)
    group = q.shape[2] // k.shape[2]
    for row, head in np.ndindex(ROWS, q.shape[2]):
        at, shared = (row, slice(None), head), (row, slice(None), head // group)
        same = SEGMENTS[row][:, None] == SEGMENTS[row][None, :]
        seen = (
            same & np.tri(LENGTH, dtype=bool) & ~np.tri(LENGTH, k=-window, dtype=bool)
        )
        scores, slope = q[at] @ k[shared].T / WIDTH**0.5, 1.0
        if softcap < np.inf:
            scores = softcap * np.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        scores = np.exp(scores) * seen
        weights = scores / scores.sum(1, keepdims=True)
        output[at] = weights @ v[shared]
        d_weights = d_output[at] @ v[shared].T
        inner = (d_weights * weights).sum(1, keepdims=True)
        d_scores = weights * (d_weights - inner) * slope / WIDTH**0.5
        d_q[at] = d_scores @ k[shared]
        d_k[shared] += d_scores.T @ q[at]
        d_v[shared] += weights.T @ d_output[at]
    return output, d_q, d_k, d_v


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_is_the_formula_outputs_and_gradients(kernel):
    arrays = draw(6, 2)
    found = outputs_and_gradients(
        *arrays, SEGMENTS, SEGMENTS, kernel=kernel, static=0, block=BLOCK
    )
    # `close` refuses what is not finite, so padding is finite too.
    for actual, expected in zip(found, formula(*arrays), strict=True):
        close(actual, expected)


def test_places_of_documents_are_those_of_the_segments():
    segments = jnp.array([[1, 1, 2, 3, 3, 3, 0, 0], [5] * 8], jnp.int32)
    lengths, starts = cudnn_attention.document_places(segments, 5)
    assert lengths.tolist() == [[2, 1, 3, 2, -1], [8, -1, -1, -1, -1]]
    assert starts.tolist() == [[0, 2, 3, 6, -1, -1], [0, -1, -1, -1, -1, -1]]
    lengths, starts = cudnn_attention.document_places(segments, 4)
    assert lengths[0].tolist() == [2, 1, 3, 2]
    assert starts[0].tolist() == [0, 2, 3, 6, -1]
    assert {x.dtype for x in (lengths, starts)} == {jnp.dtype("int32")}


@pytest.mark.parametrize(("documents", "form"), [(2, 0), (3, 1), (5, 1), (6, 2)])
def test_rows_take_the_smallest_form_that_has_room_for_their_documents(
    documents, form, monkeypatch
):
    """Bounds of 2 and 5 here, then the mask; the longest row decides for all."""
    monkeypatch.setattr(jax.lax, "switch", lambda at, *_: at)
    many = jnp.minimum(jnp.arange(LENGTH) // 40, documents - 1)
    segments = jnp.stack([jnp.ones(LENGTH, jnp.int32), many])
    assert cudnn_attention.bounds(LENGTH) == [2, 5]
    assert cudnn_attention._by_count(lambda form: form, segments) == form


def test_places_of_several_runs_are_computed_at_once(monkeypatch):
    """Under `vmap` a choice by number would compute every form, and JAX has no rule."""
    shapes = []
    whole = cudnn_attention._by_count

    def counted(run, segments, *arrays):
        shapes.append(segments.shape)
        return whole(run, segments, *arrays)

    monkeypatch.setattr(cudnn_attention, "_by_count", counted)
    q, k, v, d_output = (jnp.stack([x, x + 1]) for x in draw(4, 2))

    def run(q, k, v, d_output):
        output, backward = jax.vjp(
            lambda *x: attend("cudnn", *x, SEGMENTS, SEGMENTS), q, k, v
        )
        return output, *backward(d_output)

    found = jax.jit(jax.vmap(run))(q, k, v, d_output)
    assert set(shapes) >= {(2 * ROWS, LENGTH)}
    for number in range(2):
        expected = formula(*(x[number] for x in (q, k, v, d_output)))
        for actual, other in zip(found, expected, strict=True):
            close(actual[number], other)


@pytest.mark.soak
@pytest.mark.parametrize("block", [70, 1000])
def test_the_block_of_xla_does_not_change_its_results(block):
    arrays = draw(4, 2)
    found = outputs_and_gradients(
        *arrays, SEGMENTS, SEGMENTS, kernel="xla", static=0, block=block
    )
    for actual, expected in zip(found, formula(*arrays), strict=True):
        close(actual, expected)


@pytest.mark.parametrize(
    "kernel, softcap, windowed",
    [
        ("xla", 0.9, True),
        ("splash", 0.9, None),
        ("cudnn", 0.0, True),
        in_soak("splash", 0.0, True),
    ],
)
def test_windows_and_soft_caps_are_the_formula(kernel, softcap, windowed):
    """The window ends within a block; a flag of the running program switches it."""
    window, arrays = 70, draw(4, 2)

    def found(windowed):
        rule = ScoreRule(window, softcap, windowed)
        options = {"kernel": kernel, "static": 0, "block": BLOCK, "rule": rule}
        return outputs_and_gradients(*arrays, SEGMENTS, SEGMENTS, **options)

    cap = softcap or np.inf
    flag = None if windowed is None else jnp.array(True)
    expected = formula(*arrays, window=window, softcap=cap)
    for actual, right in zip(found(flag), expected, strict=True):
        close(actual, right)
    if windowed:
        everything = found(jnp.array(False))
        for actual, right in zip(
            everything, formula(*arrays, softcap=cap), strict=True
        ):
            close(actual, right)


def test_xla_reads_no_block_before_the_window():
    q, k, v, d_output = draw(2, 2)
    earlier = (np.arange(LENGTH) < BLOCK)[None, :, None, None]
    k, v = (jnp.where(earlier, jnp.nan, x) for x in (k, v))
    late, ones = np.s_[:, 2 * BLOCK :], np.ones_like(SEGMENTS)
    arrays = (q[late], k, v, d_output[late], ones[late], ones)
    options = {"kernel": "xla", "block": BLOCK, "offset": np.int32(2 * BLOCK)}
    for x in outputs_and_gradients(*arrays, **options, rule=ScoreRule(80)):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("window", [0, 80])
def test_a_sink_is_a_score_that_mixes_no_value_in(window):
    """Outputs, and gradients of queries, keys, values and sinks."""
    q, k, v, d_output = draw(4, 2)
    sinks = jnp.float32([0.5, -2.0, 3.0, 1.0])
    seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & np.tri(LENGTH, dtype=bool)[
        None
    ]
    if window:
        seen &= ~np.tri(LENGTH, k=-window, dtype=bool)[None]

    def at_once(q, k, v, sinks):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / WIDTH**0.5
        scores = jnp.where(seen[:, None], scores, -1e30)
        sink = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1))
        return jnp.einsum("bnts,bsnh->btnh", weights[..., :-1], v)

    def in_blocks(q, k, v, sinks):
        rule = ScoreRule(window, sinks=sinks)
        return attend("xla", q, k, v, SEGMENTS, SEGMENTS, rule=rule)

    def run(attention):
        @jax.jit
        def both(*arrays):
            output, back = jax.vjp(attention, *arrays)
            return output, *back(d_output)

        return both(q, k, v, sinks)

    close(run(in_blocks), run(at_once))


@pytest.mark.parametrize("kernel, platform", [("cudnn", "gpu"), ("splash", "tpu")])
def test_fused_kernels_say_that_they_have_no_sinks(kernel, platform):
    rule = ScoreRule(sinks=jnp.zeros(4))
    assert chosen("auto", platform, rule=rule).kernel == "xla"
    with pytest.raises(UserError, match=f"{kernel}' cannot work here: it has no sinks"):
        chosen(kernel, platform, rule=rule)
    with pytest.raises(ValueError, match="has no sinks"):
        attend(kernel, *draw(4, 2)[:3], SEGMENTS, SEGMENTS, rule=rule)


def test_cudnn_says_that_it_cannot_cap_scores():
    capped = ScoreRule(softcap=50.0)
    assert chosen("auto", "gpu", rule=capped).kernel == "xla"
    with pytest.raises(UserError, match="it cannot cap scores, and this model caps"):
        chosen("cudnn", "gpu", rule=capped)
    assert chosen("auto", "gpu", rule=ScoreRule(128)).kernel == "cudnn_mask"
    # A window as long as the row changes nothing.
    assert chosen("auto", "gpu", rule=ScoreRule(2048)).kernel == "cudnn"
    assert chosen("auto", "tpu", rule=capped).kernel == "splash"
    with pytest.raises(ValueError, match="cannot cap scores"):
        attend("cudnn_mask", *draw(2, 2)[:3], SEGMENTS, SEGMENTS, rule=capped)


@pytest.mark.soak
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_is_near_the_formula(kernel):
    """Also with as many keys as queries, which Splash computes another way."""
    arrays = draw(2, 2, jnp.bfloat16)
    found = outputs_and_gradients(
        *arrays, SEGMENTS, SEGMENTS, kernel=kernel, static=0, block=BLOCK
    )
    for actual, expected in zip(found, formula(*arrays), strict=True):
        assert actual.dtype == jnp.bfloat16
        close(np.float32(actual), expected, rtol=2e-2)


@pytest.mark.parametrize(
    "kernel, start, end",
    [
        ("xla", 149, LENGTH),
        ("splash", 149, LENGTH),
        ("cudnn", 149, LENGTH),
        ("cudnn", 0, 149),
        in_soak("xla", 0, 149),
        in_soak("splash", 0, 149),
    ],
)
def test_a_shard_of_the_context_is_its_part_of_the_whole(kernel, start, end):
    """It has its queries and all keys; both are odd and fit no block."""
    q, k, v, d_output = draw(4, 2)
    here = np.s_[:, start:end]
    arrays = (q[here], k, v, d_output[here], SEGMENTS[here], SEGMENTS)
    options = {"kernel": kernel, "block": BLOCK, "static": start}
    found = outputs_and_gradients(*arrays, **options)
    mine = ((np.arange(LENGTH) >= start) & (np.arange(LENGTH) < end))[:, None, None]
    output, d_q, d_k, d_v = formula(q, k, v, np.where(mine, d_output, 0.0))
    for actual, expected in zip(
        found, (output[here], d_q[here], d_k, d_v), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize("kernel", ["xla", *map(in_soak, sorted({*KERNELS} - {"xla"}))])
def test_each_kernel_runs_on_a_mesh_that_splits_rows_heads_and_tokens(kernel):
    q, k, v, d_output = draw(4, 2)
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = jax.sharding.Mesh(devices, ("rows", "heads", "context"))
    split = PartitionSpec("rows", "context", "heads")

    def local(q, k, v, segments):
        offset = jax.lax.axis_index("context") * q.shape[1]
        k, v, k_segments = (
            jax.lax.all_gather(x, "context", axis=1, tiled=True)
            for x in (k, v, segments)
        )
        return attend(kernel, q, k, v, segments, k_segments, offset=offset)

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, split, PartitionSpec("rows", "context")),
        out_specs=split,
        check_vma=False,
    )

    @jax.jit
    def run(q, k, v, d_output):
        output, backward = jax.vjp(lambda *x: sharded(*x, SEGMENTS), q, k, v)
        return output, *backward(d_output)

    found = run(q, k, v, d_output)
    for actual, expected in zip(found, formula(q, k, v, d_output), strict=True):
        close(actual, expected)


@pytest.mark.parametrize(
    ("kernel", "offset", "unread"),
    [
        in_soak("cudnn", 100, 200),
        in_soak("splash", np.int32(100), 256),
        ("xla", np.int32(100), 256),
    ],
    ids=["static", "traced", "traced-xla"],
)
def test_keys_of_the_future_are_never_read(kernel, offset, unread):
    """NaN spreads from whatever is computed with it, masked or not."""
    q, k, v, d_output = draw(2, 2)
    future = (np.arange(LENGTH) >= unread)[None, :, None, None]
    k, v = (jnp.where(future, jnp.nan, x) for x in (k, v))
    here = np.s_[:, 100:200]
    arrays = (q[here], k, v, d_output[here], SEGMENTS[here], SEGMENTS)
    where = "static" if isinstance(offset, int) else "offset"
    options = {"kernel": kernel, "block": BLOCK, where: offset}
    found = outputs_and_gradients(*arrays, **options)
    for x in found:
        assert np.isfinite(x).all()


@pytest.mark.soak
def test_a_block_of_xla_reads_no_key_past_its_own_end():
    """Where its blocks end decides what a NaN at token 128 reaches."""
    q, k, v, _ = draw(2, 2)
    v = v.at[:, BLOCK].set(jnp.nan)
    output = jax.jit(functools.partial(attend, "xla"))(q, k, v, SEGMENTS, SEGMENTS)
    assert np.isfinite(output[:, :BLOCK]).all()
    assert np.isnan(output[:, BLOCK : 2 * BLOCK]).all()


def test_xla_reads_no_block_of_earlier_documents():
    """The cost follows documents: what lies before the first one is never visited."""
    q, k, v, d_output = draw(4, 2)
    segments = np.repeat([[1, 2, 3]], [140, 120, 40], axis=1).repeat(ROWS, axis=0)
    earlier = (np.arange(LENGTH) < BLOCK)[None, :, None, None]
    k, v = (jnp.where(earlier, jnp.nan, x) for x in (k, v))
    # Block 1 holds the end of the first document, block 2 nothing of it.
    late = np.s_[:, 2 * BLOCK :]
    arrays = (q[late], k, v, d_output[late], segments[late], segments)
    options = {"kernel": "xla", "block": BLOCK, "offset": np.int32(2 * BLOCK)}
    for x in outputs_and_gradients(*arrays, **options):
        assert np.isfinite(x).all()
    whole = jax.jit(functools.partial(attend, "xla"))(q, k, v, segments, segments)
    assert np.isnan(whole[:, BLOCK : BLOCK + 12]).all()
    assert np.isfinite(whole[:, 2 * BLOCK :]).all()


@pytest.mark.parametrize("kernel", ["xla", "cudnn", "splash"])
def test_a_window_as_long_as_the_row_is_the_plain_program(kernel):
    arrays = (*draw(2, 2)[:3], SEGMENTS, SEGMENTS)

    def text(**options):
        run = functools.partial(attend, kernel, **options)
        return str(jax.make_jaxpr(run)(*arrays))

    flag = jnp.array(True)
    plain = text()
    for whole in (ScoreRule(LENGTH), ScoreRule(LENGTH, 0.0, flag)):
        assert len(text(rule=whole)) == len(plain)
    assert len(text(rule=ScoreRule(LENGTH - 1))) != len(plain)


def lowered(platform, kernel, *, length=256, traced=False, rule=PLAIN):
    """The program of a gradient for `platform`, which this machine may lack."""
    rows = [jax.ShapeDtypeStruct((2, length), jnp.int32)] * 2
    q, k = (
        jax.ShapeDtypeStruct((2, length, heads, 64), jnp.bfloat16) for heads in (8, 4)
    )

    def loss(q, k, v, q_segments, k_segments, offset):
        arrays = (q, k, v, q_segments, k_segments)
        at = offset if traced else 0
        options = {"kernel": kernel, "block": 128, "offset": at, "rule": rule}
        mixed = packed_attention(*arrays, **options)
        return mixed.astype(jnp.float32).sum()

    traced_program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(
        q, k, k, *rows, jax.ShapeDtypeStruct((), jnp.int32)
    )
    return traced_program.lower(lowering_platforms=(platform,)).as_text()


def test_splash_becomes_three_kernels_on_a_tpu():
    for traced in (False, True):
        text = lowered("tpu", "splash", traced=traced)
        assert text.count("custom_call @tpu_custom_call") == 3
        for part in ("fwd_segmented_residuals", "dq_segmented", "dkv_segmented"):
            assert f"splash_mha_{part}" in text


@pytest.fixture
def as_for_a_gpu(monkeypatch):
    """JAX's own functions, which look for the devices of this machine."""
    monkeypatch.undo()
    there = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", there)
    monkeypatch.setattr(
        fused_attention_stablehlo, "check_compute_capability", lambda _: True
    )


def test_the_mask_becomes_cudnns_calls_on_a_gpu(as_for_a_gpu):
    def calls(**options):
        text = lowered("cuda", "cudnn_mask", **options)
        names = re.findall(r"custom_call @__cudnn\$(\w+)", text)
        assert names == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
        return set(re.findall(r"mask_type\W+22: \W+22(\w+)", text)), text

    # The triangle is cuDNN's where it can be, and in the mask where it cannot.
    assert calls()[0] == {"CAUSAL"}
    assert calls(traced=True)[0] == {"NO_MASK"}
    # JAX refuses an odd length in the backward pass.
    text = calls(length=255)[1]
    assert "tensor<2x1x256x256xbf16>" in text
    # A gradient of the mask would be a fourth result; JAX 0.10 computes it for all.
    if jax.__version_info__ >= (0, 12):
        assert not re.search(r"Backward.*-> \(.*tensor<2x1x256x256xbf16>.*\)", text)


def test_windows_and_soft_caps_become_calls_of_the_real_platforms(as_for_a_gpu):
    """Splash has a form for either kind of layer; the program chooses."""
    windowed = jnp.array(True)
    text = lowered("cuda", "cudnn_mask", rule=ScoreRule(100, 0.0, windowed))
    names = re.findall(r"custom_call @__cudnn\$(\w+)", text)
    assert names == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
    text = lowered("tpu", "splash", rule=ScoreRule(100, 50.0, windowed))
    assert text.count("stablehlo.case") == 2
    assert text.count("tpu_custom_call") == 2 * 3
    # The backward pass keeps the normalizers of one form, not those of both.
    results = re.findall(r"^    }\) : \(tensor<i32>\) -> (.*)$", text, re.MULTILINE)
    assert [types.count("256xf32") for types in results] == [1, 0]


def test_places_of_documents_become_cudnns_calls_on_a_gpu(as_for_a_gpu):
    """Two forms without a mask and the one with it; the gradient alone is computed."""
    text = lowered("cuda", "cudnn", length=1024)
    names = re.findall(r"custom_call @__cudnn\$(\w+)", text)
    assert sorted(names) == sorted(
        2 * ["fmhaSoftmax", "fmhaSoftmaxBackward"]
        + ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
    )
    assert text.count("stablehlo.case") == 1
    most = re.findall(r"max_seg_per_batch\W+22: (\d+)", text)
    assert sorted(most) == ["1", "1", "2", "2", "8", "8"]
    masks = re.findall(r"mask_type\W+22: \W+22(\w+)", text)
    assert sorted(masks) == 2 * ["CAUSAL"] + 4 * ["PADDING_CAUSAL"]


def chosen(kernel, platform, **changes):
    facts = {"dtype": jnp.bfloat16, "head_dim": 128, "length": 2048}
    return choose(kernel, platform, **(facts | {"capability": "9.0"} | changes))


@pytest.mark.parametrize(
    ("platform", "changes", "kernel", "reason"),
    [
        ("tpu", {}, "splash", "tpu"),
        ("tpu", {"dtype": "float32"}, "splash", "tpu"),
        ("tpu", {"dtype": "float16"}, "xla", "no splash: .* not in float16"),
        ("gpu", {}, "cudnn", "gpu"),
        ("cuda", {"head_dim": 256}, "cudnn", "cuda"),
        ("gpu", {"dtype": "float32"}, "xla", "no cudnn: .* not in float32"),
        ("gpu", {"head_dim": 100}, "xla", "multiple of 8 up to 256, it is 100"),
        (
            "gpu", {"head_dim": 256, "capability": "8.9"}, "xla",
            "multiple of 8 up to 128, it is 256",
        ),
        (
            "gpu", {"capability": "8.0"}, "cudnn_mask",
            r"best on gpu; documents as a mask: .* 9\.0, this GPU has 8\.0",
        ),
        ("gpu", {"capability": "7.5"}, "xla", r"8\.0 \(Ampere\), this GPU has 7\.5"),
        ("gpu", {"capability": "gfx942"}, "xla", "NVIDIA GPU, this one is gfx942"),
        ("gpu", {"length": 32768}, "cudnn", "gpu"),
        ("gpu", {"length": 65536}, "xla", r"one row of 65536 takes 8\.0 GiB"),
        ("gpu", {"length": 32768, "rows": 4}, "xla", r"4 rows of 32768 takes 8\.0 GiB"),
        ("cpu", {"capability": "0.0"}, "xla", "the only one on cpu"),
    ],
)  # fmt: skip
def test_auto_takes_the_best_kernel_that_works_and_says_why(
    platform, changes, kernel, reason
):
    found = chosen("auto", platform, **changes)
    assert found.kernel == kernel
    assert re.search(reason, found.reason)


def test_an_explicit_kernel_is_taken_where_it_works():
    assert chosen("xla", "tpu").kernel == "xla"
    assert chosen("splash", "tpu").kernel == "splash"
    assert chosen("cudnn_mask", "gpu").kernel == "cudnn_mask"
    # Length is a matter of taste, not of what works.
    assert chosen("cudnn", "gpu", length=65536).kernel == "cudnn"


def test_cudnn_takes_the_mask_where_jax_lacks_places_and_says_so(monkeypatch):
    def older(query, key, value, bias, mask): ...

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", older)
    for kernel in ("auto", "cudnn"):
        found = chosen(kernel, "gpu")
        assert found.kernel == "cudnn_mask"
        assert "JAX 0" in found.reason and "does not take" in found.reason


@pytest.mark.parametrize(
    ("kernel", "platform", "changes", "message"),
    [
        ("cudnn", "cpu", {}, "'cudnn' cannot work here: it needs an NVIDIA GPU, this"),
        ("cudnn", "gpu", {"dtype": "float32"}, "in bfloat16 or float16, not in float3"),
        ("splash", "gpu", {}, "it needs a TPU, this is gpu; use 'auto' or 'xla'"),
    ],
)
def test_an_explicit_kernel_that_cannot_work_is_refused(
    kernel, platform, changes, message
):
    with pytest.raises(UserError, match=message):
        chosen(kernel, platform, **changes)


def test_only_a_kernel_can_be_run():
    """`auto` is an answer of `choose`, which knows the platform; a model does not."""
    q, k, v, _ = draw(2, 2)
    with pytest.raises(ValueError, match="'auto'"):
        attend("auto", q, k, v, SEGMENTS, SEGMENTS)


def test_a_kernel_is_logged_once_however_often_its_model_is_made(caplog):
    caplog.set_level(logging.INFO)
    make_model._log_once.cache_clear()
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    for _ in range(2):
        make_model.make_model(ModelConfig(), TINY, mesh, length=24, rows=8)
    assert caplog.text.count("attention: xla") == 1
