"""Compares written files with the model of a run: weights by layer, and logits.

Our model computes as always, with its adapters beside the weights. The model of the
files is never in memory as a whole: each layer is read, split over the devices,
compared and applied, and then dropped.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from research.core.errors import ParityError
from research.formats.export_format import ExportedModel, WrittenModel
from research.formats.proof.parity_limits import Parity
from research.models.architecture import Architecture
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes
from research.tokenize.tokenizer import Tokenizer
from research.weights.contraction import materialize

Array = jax.Array
Leaves = Mapping[str, Any]
# Logits are exact to float32 on every device, also where products are faster in less.
PRECISION = "highest"
TEXTS = ("Hello, world! 123", "ü 日本\n\n  x\t{}", "<|im_start|>user")


@dataclasses.dataclass(frozen=True)
class ProofRows:
    """Rows of tokens; `[B, T]` int32 each, as in a `Batch`. `origin` is for people."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    origin: str


def prove(
    exported: ExportedModel, written: WrittenModel, rows: ProofRows, numbers: str
) -> Parity:
    """Measures how far `written` is from `exported`; every process must call it.

    Args:
      exported: the model of the run.
      written: its files, opened anew.
      rows: what both compute.
      numbers: in the files, a key of `LIMITS`.

    Raises:
      ParityError: the files describe another model, or are further away than rounding
        explains.
    """
    architecture, specs = written.architecture, exported.model.specs
    model = _proof_model(architecture)
    for path in {**specs, **model.specs}:
        ours, theirs = (
            x[path].shape if path in x else None for x in (specs, model.specs)
        )
        if ours != theirs:
            raise ParityError(
                f"the written files describe {path} as {theirs}, and the run has {ours}"
            )
    if written.tokenizer is not None:
        _compare_tokenizers(exported.tokenizer, written.tokenizer)
    with jax.default_matmul_precision(PRECISION):
        ours = _logits(exported.model.architecture)(
            dict(exported.weights), rows.tokens, rows.positions, rows.segments
        )
        parity = _compare(exported, written, rows, ours, numbers)
    if faults := parity.faults():
        raise ParityError(
            "the written files compute something else than the run, so they are "
            f"removed: {'; '.join(faults)}, on {parity.rows}"
        )
    return parity


def _compare_tokenizers(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Raises ParityError: they split texts or end answers differently."""
    for name, read in (
        ("ids of texts", lambda x: x.encode_texts(TEXTS)),
        ("chat template", lambda x: x.chat_template),
        ("ids that end an answer", lambda x: sorted(x.end_ids)),
    ):
        if read(ours) != read(theirs):
            raise ParityError(
                f"the tokenizer in the written files has other {name} than the run: "
                f"{str(read(theirs))[:80]!r}, not {str(read(ours))[:80]!r}"
            )


def _proof_model(architecture: Architecture) -> Model:
    return Model(architecture, Options(dtype=jnp.float32))


@functools.cache
def _logits(architecture: Architecture) -> Any:
    """`(params, tokens, positions, segments) -> [B, T, V]`, compiled on use."""
    model = _proof_model(architecture)

    def logits(params: Leaves, *rows: Array) -> Array:
        return model.logits(params, model.hidden(params, *rows))

    return jax.jit(logits)


@functools.cache
def _programs(architecture: Architecture) -> tuple[Any, Any, Any]:
    """The begin, one layer and the end of the model of the files.

    Each also measures how far its parameters are from ours, in squares.
    """
    model = _proof_model(architecture)

    def begin(theirs: Leaves, ours: Leaves, tokens: Array, positions: Array):
        return model.embed(theirs, tokens, positions), _squares(theirs, ours)

    def layer(theirs: Leaves, ours: Leaves, number: Array, x: Array, *rows: Array):
        own = {p: jax.tree.map(lambda x: x[number][None], v) for p, v in ours.items()}
        return model.layer(theirs, number, x, *rows), _squares(theirs, own)

    def end(theirs: Leaves, ours: Leaves, x: Array, logits: Array, is_token: Array):
        found = model.logits(theirs, model.final_norm(theirs, x))
        return _statistics(logits, found, is_token), _squares(theirs, ours)

    return jax.jit(begin), jax.jit(layer), jax.jit(end)


def _squares(theirs: Leaves, ours: Leaves) -> dict[str, tuple[Array, Array]]:
    """By path: the sum of squared differences, and of our squares."""

    def one(found: Array, own: Any) -> tuple[Array, Array]:
        own = materialize(jax.tree.map(_widened, own)).astype(jnp.float32)
        return jnp.sum((found.astype(jnp.float32) - own) ** 2), jnp.sum(own**2)

    return {path: one(found, ours[path]) for path, found in theirs.items()}


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _statistics(ours: Array, theirs: Array, is_token: Array) -> dict[str, Array]:
    """Sums and largest values over the real tokens of `[B, T, V]` logits."""
    ours -= ours.mean(-1, keepdims=True)
    apart = theirs - theirs.mean(-1, keepdims=True) - ours
    log_p, log_q = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
    kl = jnp.where(is_token, jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), 0.0)
    mask = is_token[..., None]
    same = ours.argmax(-1) == theirs.argmax(-1)
    return {
        "largest": jnp.max(jnp.where(mask, jnp.abs(apart), 0.0)),
        "apart": jnp.sum(jnp.where(mask, apart**2, 0.0)),
        "square": jnp.sum(jnp.where(mask, ours**2, 0.0)),
        "kl": jnp.sum(kl),
        "largest_kl": jnp.max(kl),
        "same": jnp.sum(is_token & same),
    }


def _compare(
    exported: ExportedModel,
    written: WrittenModel,
    rows: ProofRows,
    logits: Array,
    numbers: str,
) -> Parity:
    architecture, specs = written.architecture, exported.model.specs
    begin, layer, end = _programs(architecture)
    mesh = _mesh_of(exported.weights)
    squares: dict[str, tuple[Array, Array]] = {}

    def load(paths: list[str], index: tuple[int, ...] = ()) -> dict[str, Array]:
        return {p: _placed(written.read(p, index), p, exported, mesh) for p in paths}

    def ours(paths: list[str]) -> dict[str, Any]:
        return {path: exported.weights[path] for path in paths}

    def keep(found: Mapping[str, tuple[Array, Array]], suffix: str = "") -> None:
        squares.update({path + suffix: pair for path, pair in found.items()})

    stacked = [path for path in specs if path.startswith("layers.")]
    first = [path for path in specs if "embedding." in path]
    last = [path for path in specs if path not in {*stacked, *first}]
    if architecture.tied_head:
        last.append("embedding.table")
    x, found = begin(load(first), ours(first), rows.tokens, rows.positions)
    keep(found)
    for number in range(architecture.layers):
        theirs = load(stacked, (number,))
        at = (np.int32(number), x, rows.positions, rows.segments)
        x, found = layer(theirs, ours(stacked), *at)
        del theirs  # Room for the next layer.
        keep(found, f" of layer {number}")
    is_token = rows.segments > 0
    sums, found = end(load(last), ours(last), x, logits, is_token)
    keep(found)
    return _parity(sums, squares, int(is_token.sum()), rows.origin, numbers)


def _parity(
    sums: Mapping[str, Array],
    squares: Mapping[str, tuple[Array, Array]],
    tokens: int,
    origin: str,
    numbers: str,
) -> Parity:
    of = {name: float(value) for name, value in sums.items()}
    apart = {path: _share(float(x), float(y)) for path, (x, y) in squares.items()}
    # Not `max` of values: a NaN must win.
    worst = max(apart, key=lambda path: (np.isnan(apart[path]), apart[path]))
    return Parity(
        rows=origin,
        tokens=tokens,
        numbers=numbers,
        weights=apart[worst],
        worst=worst,
        logits=_share(of["apart"], of["square"]),
        largest=of["largest"],
        kl=max(0.0, of["kl"] / tokens) if of["kl"] == of["kl"] else of["kl"],
        largest_kl=of["largest_kl"],
        agreement=of["same"] / tokens,
    )


def _share(apart: float, whole: float) -> float:
    """The root of a share of squares; where all is zero, nothing may differ."""
    return float(np.sqrt(apart / whole)) if whole else float(apart > 0)


def _mesh_of(weights: Leaves) -> Mesh | None:
    """The mesh over which the parameters are split; None on one device."""
    where = jax.tree.leaves(dict(weights))[0].sharding
    return where.mesh if isinstance(where, NamedSharding) else None


def _placed(
    value: np.ndarray, path: str, exported: ExportedModel, mesh: Mesh | None
) -> Array:
    """One layer `[1, *in, *out]`, or a parameter without layers, over the devices."""
    spec = exported.model.specs[path]
    if spec.stacked:
        value = value[None]
    if mesh is None:
        return jnp.asarray(value)
    alone = dataclasses.replace(spec, shape=value.shape)
    sharding = meshes.shardings({path: alone}, mesh)[path]
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
