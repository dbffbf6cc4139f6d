"""Attention kernels of this device against the plain formula in float32."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from card_job import attention_calls
from random_rows import random_rows

from research.core.errors import UserError
from research.models import attention_kernels
from research.models.attention import ScoreRule
from research.models.cached_attention import attend_cached
from research.models.paged_attention import can_attend_pages

Array = jax.Array
Result = dict[str, Any]
# bfloat16 keeps 8 bits; a sum over a row of products of rounded values stays within
# some of them. The tests hold every kernel to the same share of the largest value.
TOLERANCE = 2e-2
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of packed rows.

    Attributes:
      heads, kv_heads, width: of the model that `like` names.
      documents: of a row, equally long.
      window: tokens that a query sees; 0: all of its document.
      softcap: of the scores; 0: none.
      sinks: whether each head has one.
    """

    like: str
    heads: int
    kv_heads: int
    width: int
    documents: int = 3
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    def rule(self) -> ScoreRule:
        key = jax.random.key(1)
        sinks = jax.random.normal(key, (self.heads,)) if self.sinks else None
        return ScoreRule(self.window, self.softcap, sinks=sinks)

    def smaller(self, scale: int) -> "Case":
        """The same with `scale` times shorter windows and narrower heads."""
        window = -(-self.window // scale // 4)
        return dataclasses.replace(self, width=self.width // scale, window=window)


CASES = (
    Case("llama3.1-8b", 32, 8, 128),
    Case("llama3.1-8b, one document", 32, 8, 128, documents=1),
    Case("llama-1b", 32, 8, 64),
    Case("mistral, a window", 32, 8, 128, window=512),
    Case("gemma2, a window and capped scores", 16, 8, 256, window=512, softcap=50.0),
    Case("gpt-oss, a window and sinks", 64, 8, 64, window=128, sinks=True),
)


def seconds_of(call: Callable[[], Any], times: int) -> float:
    """Seconds of one call, of `times` that are given to the device at once."""
    jax.block_until_ready(call())
    begun = time.perf_counter()
    for _ in range(times):
        last = call()  # Earlier results free their memory.
    jax.block_until_ready(last)
    return (time.perf_counter() - begun) / times


def kernels(
    tokens: tuple[int, int] = (4, 2048),
    scale: int = 1,
    decoding: tuple[int, int] = (64, 2048),
    times: int = 10,
    only: Sequence[str] = (),
    cases: Sequence[str] = (),
) -> Iterator[Result]:
    """Each attention kernel, in training and in decoding, against the plain formula.

    In training: outputs and gradients of packed rows in bfloat16. A kernel is wrong
    where it is further off than `TOLERANCE` of the largest value. Where a kernel cannot
    compute a case, its line has the reason.

    Args:
      tokens: rows, and tokens of a row.
      scale: by which heads are narrower and windows shorter.
      decoding: slots, and tokens for which each has room.
      times: passes forward and backward that are timed.
      only: names of kernels; all of them where it is empty.
      cases: by what they are `like`; all of them where it is empty.
    """
    for case in CASES:
        if cases and case.like not in cases:
            continue
        yield from _packed(
            case.smaller(scale) if scale > 1 else case, tokens, times, only
        )
    yield from _decoding(decoding, times)


def _packed(
    case: Case, tokens: tuple[int, int], times: int, only: Sequence[str]
) -> Iterator[Result]:
    rows = random_rows(tuple(tokens), 2, documents=case.documents)
    segments, rule = jnp.asarray(rows["segments"]), case.rule()
    counts = case.heads, case.kv_heads, case.kv_heads, case.heads
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = tuple(
        jax.random.normal(key, (*tokens, n, case.width), jnp.bfloat16)
        for key, n in zip(keys, counts, strict=True)
    )
    setting = {k: v for k, v in dataclasses.asdict(case).items() if v}
    try:
        exact = _exact(drawn, segments, rule)
    except Exception as error:  # No memory, as a rule; another case may be smaller.
        yield {**setting, **_failure(error)}
        return
    seen = np.minimum(rows["positions"] + 1, case.window or tokens[1])
    flops = 12 * case.heads * case.width * float(seen.sum())
    for kernel in only or (*attention_kernels.KERNELS, "plain"):
        yield {"kernel": kernel, **setting} | _compared(
            functools.partial(_require, kernel, case, tokens[1], rule),
            functools.partial(_compiled, kernel, drawn, segments, rule),
            exact, times, flops,
        )  # fmt: skip


def _exact(drawn: Sequence[Array], segments: Array, rule: ScoreRule) -> list:
    """The output and the gradients in float32, row by row: scores of all are large."""
    found = []
    # Also on devices whose float32 products are of fewer bits by default.
    with jax.default_matmul_precision("highest"):
        for row in range(len(segments)):
            here = slice(row, row + 1)
            wide = tuple(x[here].astype(jnp.float32) for x in drawn)
            passes = _both_passes(wide, segments[here], rule, kernel="plain")
            found.append([np.asarray(x) for x in passes])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _compiled(
    kernel: str, drawn: Sequence[Array], segments: Array, rule: ScoreRule
) -> tuple[Callable[[], Any], Result]:
    """Both passes as one program, and the kernel's calls in it."""
    arrays = drawn, segments, rule
    program = _both_passes.lower(*arrays, kernel=kernel).compile()
    found = attention_calls(kernel, program.as_text())
    return functools.partial(program, *arrays), found


def _require(kernel: str, case: Case, length: int, rule: ScoreRule) -> None:
    """Raises UserError: the kernel cannot compute this here, or another one does."""
    if kernel == "plain":
        return
    device = jax.devices()[0]
    chosen = attention_kernels.choose(
        kernel, device.platform, dtype=jnp.bfloat16, head_dim=case.width, length=length,
        capability=str(getattr(device, "compute_capability", "0.0")), rule=rule,
    )  # fmt: skip
    if chosen.kernel != kernel:
        reason = chosen.reason.partition("; ")[2]
        raise UserError(f"{kernel}: {chosen.kernel} computes it: {reason}")


def _compared(
    require: Callable[[], None],
    make: Callable[[], tuple[Callable[[], Any], Result]],
    exact: Sequence[np.ndarray],
    times: int,
    flops: float,
) -> Result:
    """The distance of what is made from `exact` and its speed, or why there is none."""
    try:
        require()
        run, about = make()
        off = max(map(_distance, run(), exact))
        took = seconds_of(run, times)
    except UserError as error:
        return {"not_here": str(error).partition(": ")[2].partition("; use ")[0]}
    except Exception as error:  # Another kernel may still work.
        return _failure(error)
    # Not `>`: what is not a number is wrong as well.
    right = bool(off <= TOLERANCE) and about.get("right", True)
    return {
        "ms": 1e3 * took,
        "tflops": flops / took / 1e12,
        "off": off,
        "calls": about.get("calls", {}),
        "right": right,
    }


def _failure(error: Exception) -> Result:
    return {"failed": f"{type(error).__name__}: {error}"[:500]}


def _distance(found: Array, exact: np.ndarray) -> float:
    """The largest difference as a share of the largest exact value."""
    difference = np.abs(np.asarray(found, np.float32) - exact)
    share = float(difference.max() / np.abs(exact).max())
    return share if np.isfinite(share) else float("inf")


@functools.partial(jax.jit, static_argnames="kernel")
def _both_passes(drawn, segments, rule: ScoreRule, *, kernel: str):
    """The output and the gradients of queries, keys and values."""
    *inputs, d_output = drawn

    def attention(q, k, v):
        if kernel == "plain":
            index = jnp.arange(segments.shape[1])
            seen = segments[:, :, None] == segments[:, None, :]
            behind = index[:, None] - index[None]
            near = (behind >= 0) & (behind < (rule.window or len(index)))
            seen &= near[None]
            return _formula(q, k, v, seen, rule)
        return attention_kernels.packed_attention(
            q, k, v, segments, segments, kernel=kernel, block=BLOCK, rule=rule
        )

    output, backward = jax.vjp(attention, *inputs)
    return output, *backward(d_output)


def _formula(q_BTNH, k_BSKH, v_BSKH, seen_BTS, rule: ScoreRule) -> Array:
    """softmax(q k / sqrt(H)) v, with scores and softmax in float32."""
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores *= width**-0.5
    if rule.softcap:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    scores = jnp.where(seen_BTS[:, None, None], scores, -jnp.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.reshape(1, kv_heads, -1, 1, 1)
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], -1)
    weights = jax.nn.softmax(scores, -1)[..., : k_BSKH.shape[1]]
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)
    return mixed.reshape(q_BTNH.shape)


def _decoding(size: tuple[int, int], times: int) -> Iterator[Result]:
    """A new token of every slot of the 8B shape: TPUs' paged kernel, and the blocks."""
    slots, room = size
    heads, kv_heads, width = 32, 8, 128
    device, rule = jax.devices()[0], ScoreRule()
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(slots, 1, n, width) for n in (heads, kv_heads, kv_heads)]
    shapes += [(1, slots, kv_heads, room, width)] * 2
    drawn = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    length = jnp.linspace(1, room - 2, slots).astype(jnp.int32)
    new, caches = drawn[:3], tuple(drawn[3:])
    with jax.default_matmul_precision("highest"):
        exact = _cached_formula(*(x.astype(jnp.float32) for x in drawn), length)
    setting = {"slots": slots, "room": room, "heads": heads, "width": width}
    flops = 4 * heads * width * float(length.sum() + slots)

    def require() -> None:
        if device.platform != "tpu":
            raise UserError(f"paged: it needs a TPU, this is {device.platform}")
        if not can_attend_pages(new[0], caches[0], rule):
            raise UserError("paged: not this shape")

    elsewhere = "cpu" if device.platform == "cpu" else ""
    for kernel, platform in (("paged", "tpu"), ("blocks", elsewhere)):
        # The caches are given away and come back, as in the engine.
        attend = jax.jit(
            functools.partial(attend_cached, rule=rule, platform=platform),
            donate_argnums=(3, 4),
        )
        held = {"caches": tuple(map(jnp.copy, caches))}

        def run(attend=attend, held=held) -> list[Array]:
            mixed, *held["caches"] = attend(*new, *held["caches"], 0, 0, length)
            return [mixed]

        yield {"decoding": kernel, **setting} | _compared(
            require if kernel == "paged" else lambda: None, lambda run=run: (run, {}),
            [np.asarray(exact)], times, flops,
        )  # fmt: skip


@jax.jit
def _cached_formula(q, new_k, new_v, k_cache, v_cache, length) -> Array:
    """Attention of each slot's new token to the slot's tokens and to itself."""
    row, at = jnp.arange(len(length)), length

    def write(cache, new):
        return cache[0].at[row, :, at].set(new[:, 0]).transpose(0, 2, 1, 3)

    keys, values = write(k_cache, new_k), write(v_cache, new_v)
    seen = (jnp.arange(keys.shape[1])[None] <= at[:, None])[:, None]
    return _formula(q, keys, values, seen, ScoreRule())
