"""Compares written files with the model of a run: weights by layer, and logits.

Both run layer by layer: ours with its adapters beside the weights, and the one in the
files, which is never in memory as a whole. Each of its layers is read, split over the
devices, compared and applied, and then dropped.
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
        parity = _compare(exported, written, rows, numbers)
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
def _programs(architecture: Architecture) -> tuple[Any, Any, Any]:
    """The begin, one layer and the end of a model, compiled on use."""
    model = _proof_model(architecture)

    def layer(params: Leaves, place: Array, number: Array, x: Array, *rows: Array):
        own = _one_layer(params, place)
        return model.layer(own, number, x, *rows)

    def end(params: Leaves, x: Array) -> Array:
        return model.logits(params, model.final_norm(params, x))

    return jax.jit(model.embed), jax.jit(layer), jax.jit(end)


def _one_layer(params: Leaves, place: Array) -> Leaves:
    """The layer at `place` of stacked parameters, stacked alone."""
    return {p: jax.tree.map(lambda x: x[place][None], v) for p, v in params.items()}


@jax.jit
def _squares(
    ours: Leaves, theirs: Leaves, place: Array | None = None
) -> dict[str, tuple[Array, Array]]:
    """By path: the sum of squared differences, and of our squares."""
    ours = ours if place is None else _one_layer(ours, place)

    def one(found: Array, own: Any) -> tuple[Array, Array]:
        own = materialize(jax.tree.map(_widened, own)).astype(jnp.float32)
        return jnp.sum((found.astype(jnp.float32) - own) ** 2), jnp.sum(own**2)

    return {path: one(found, ours[path]) for path, found in theirs.items()}


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


@jax.jit
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
    exported: ExportedModel, written: WrittenModel, rows: ProofRows, numbers: str
) -> Parity:
    """Each step takes one model after the other, which needs less memory."""
    specs, weights = exported.model.specs, exported.weights
    own = _programs(exported.model.architecture)
    found = _programs(written.architecture)
    mesh, squares = _mesh_of(weights), {}

    def load(paths: list[str], index: tuple[int, ...] = ()) -> dict[str, Array]:
        return {p: _placed(written.read(p, index), p, exported, mesh) for p in paths}

    stacked = [path for path in specs if path.startswith("layers.")]
    first = [path for path in specs if "embedding." in path]
    last = [path for path in specs if path not in {*stacked, *first}]
    if exported.model.architecture.tied_head:
        last.append("embedding.table")
    at = rows.positions, rows.segments
    ours, theirs = {path: weights[path] for path in first}, load(first)
    squares.update(_squares(ours, theirs))
    x, y = (
        programs[0](params, rows.tokens, rows.positions)
        for programs, params in ((own, ours), (found, theirs))
    )
    ours = {path: weights[path] for path in stacked}
    for number in map(np.int32, range(written.architecture.layers)):
        x = own[1](ours, number, number, x, *at).block_until_ready()
        theirs = load(stacked, (int(number),))
        apart = _squares(ours, theirs, number)
        squares |= {f"{path} of layer {number}": pair for path, pair in apart.items()}
        y = found[1](theirs, np.int32(0), number, y, *at).block_until_ready()
        del theirs  # Room for the next layer of ours.
    ours = {path: weights[path] for path in last}
    logits = own[2](ours, x).block_until_ready()
    theirs = load(last)
    squares.update(_squares(ours, theirs))
    sums = _statistics(logits, found[2](theirs, y), rows.segments > 0)
    return _parity(sums, squares, int((rows.segments > 0).sum()), rows.origin, numbers)


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
