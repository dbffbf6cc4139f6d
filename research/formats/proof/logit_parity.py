"""Compares written files with the model of a run: settings, weights and logits.

Models run layer by layer: the run's own with its adapters beside the weights, and the
one in the files, which is never in memory as a whole. Each of its layers is read, split
over the devices, compared and applied, and then dropped. Tables of embeddings and heads
are compared in pieces of the vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from research.core.errors import ParityError
from research.formats.export_format import ExportedModel, WrittenModel
from research.formats.proof.file_layout import with_places
from research.formats.proof.logit_differences import add_piece, measures, no_sums
from research.formats.proof.parity import Parity
from research.formats.proof.proof_tokens import ProofRows
from research.formats.proof.same_model import require_same_model
from research.formats.proof.stored_numbers import KINDS, Axes
from research.formats.proof.weight_parity import (
    add_update,
    compare_numbers,
    layer_of,
    round_numbers,
    vocabulary_rows,
)
from research.models.architecture import Architecture
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes
from research.weights.contraction import transpose
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Matrix

Array = jax.Array
Leaves = Mapping[str, Any]
# Logits are exact to float32 on every device, also where products are faster in less.
PRECISION = "highest"
TABLE, HEAD = "embedding.table", "head.kernel"
ROWS = Axes(1, 0)  # of a piece of the vocabulary
PIECE = 2**21  # numbers of a table that are compared at a time


def prove(
    exported: ExportedModel, written: WrittenModel, rows: ProofRows, asked: str
) -> Parity:
    """Measures how far `written` is from `exported`; every process must call it.

    Args:
      exported: the model of the run.
      written: its files, opened anew.
      rows: what both compute.
      asked: the numbers that the files were to have, as `ExportOptions.numbers`.

    Raises:
      ParityError: the files hold another model, or are further away than rounding
        explains.
    """
    reasons = require_same_model(exported, written, asked)
    written = with_places(written, exported.model.specs)
    rows = rows.within(written.architecture.max_position)
    with jax.default_matmul_precision(PRECISION):
        parity = _Proof(exported, written, rows).run(
            tuple(dict.fromkeys(reasons.values()))
        )
    if faults := parity.faults():
        remedy = "please report this, with the command"
        if asked != "float32":
            remedy = (
                "use --dtype=float32 without --quant, and report this if it fails, too"
            )
        raise ParityError(
            "the written files compute something else than the run, so they are "
            f"removed: {'; '.join(faults)}, on {parity.rows}; {remedy}"
        )
    return parity


@functools.cache
def _programs(architecture: Architecture) -> tuple[Any, Any, Any, Any]:
    """The parts of a model, compiled on use: beginning, one layer, and both ends."""
    model = Model(architecture, Options(dtype=jnp.float32))

    def layer(params: Leaves, place: Array, number: Array, x: Array, *rows: Array):
        own = {path: layer_of(leaf, place) for path, leaf in params.items()}
        return model.layer(own, number, x, *rows)

    def piece(rows: Matrix, x: Array) -> Array:
        path, head = (
            (TABLE, rows) if architecture.tied_head else (HEAD, transpose(rows))
        )
        return model.logits({path: head}, x)

    parts = (model.embed, layer, model.final_norm, piece)
    embed, layer, norm, piece = map(jax.jit, parts)
    return embed, layer, norm, piece


_rows_of = jax.jit(vocabulary_rows, static_argnums=2)
_layer_of = jax.jit(layer_of)


@dataclasses.dataclass
class _State:
    """One of the compared models: what it computes with, and how far it is.

    Attributes:
      architecture: of the model.
      hidden: the input of the next layer.
    """

    architecture: Architecture
    hidden: Any = None

    @property
    def programs(self) -> tuple[Any, Any, Any, Any]:
        return _programs(self.architecture)


class _Proof:
    """One comparison. Models take turns at each step, which needs less memory.

    `run` is the run's, and `files` that of the files. `other` is the run's with the
    rounding of the files; or the base model, where the files hold adapters alone.
    """

    def __init__(self, exported: ExportedModel, written: WrittenModel, rows: ProofRows):
        self.exported, self.written, self.rows = exported, written, rows
        self.specs = exported.model.specs
        own, found = exported.model.architecture, written.architecture
        self.on_base = any(x.is_update for x in written.held.values())
        self.states = {"run": _State(own), "files": _State(found)}
        rounds = {x.kind for x in written.held.values()} != {"float32"}
        if self.on_base or rounds or own.activation != found.activation:
            like = dataclasses.replace(own, activation=found.activation)
            self.states["other"] = _State(own if self.on_base else like)
        self.mesh = _mesh_of(exported.weights)
        self.sums: dict[str, dict[str, float]] = {}

    def run(self, reasons: tuple[str, ...]) -> Parity:
        """Measures everything."""
        architecture = self.written.architecture
        self._begin()
        stacked = [path for path in self.specs if path.startswith("layers.")]
        for number in range(architecture.layers):
            self._layer(stacked, number)
        last = [path for path in self.specs if path.startswith("final_norm.")]
        for name, state in self.states.items():
            state.hidden = state.programs[2](self._params(name, last), state.hidden)
        sums = self._end(TABLE if architecture.tied_head else HEAD)
        return self._parity(sums, reasons)

    def _begin(self) -> None:
        """Embeds the tokens; only their rows of the table are needed."""
        table = _Vocabulary(self, TABLE)
        if not self.exported.model.architecture.tied_head:
            for ids in table.pieces():
                table.compare(ids)
        used, tokens = np.unique(self.rows.tokens, return_inverse=True)
        tokens = tokens.reshape(self.rows.tokens.shape).astype(np.int32)
        places = [path for path in self.specs if path.startswith("position_embedding.")]
        for name, state in self.states.items():
            params = {TABLE: table.rows(name, used), **self._params(name, places)}
            embed = state.programs[0](params, tokens, self.rows.positions)
            state.hidden = embed.block_until_ready()

    def _layer(self, paths: list[str], number: int) -> None:
        place = np.int32(number)
        for name, state in self.states.items():
            params = self._params(name, paths, place)
            at = (place if name == "run" else np.int32(0)), place
            rows = state.hidden, self.rows.positions, self.rows.segments
            state.hidden = state.programs[1](params, *at, *rows).block_until_ready()
            del params  # Room for the next model's.

    def _params(
        self, name: str, paths: list[str], place: np.int32 | None = None
    ) -> dict[str, Any]:
        """Parameters of one of the models: one layer, but all layers of the run's."""
        own = {path: self.exported.weights[path] for path in paths}
        if name == "run":
            return own
        base, held = self.exported.base_weights, self.written.held
        if name == "other" and self.on_base:
            return {path: _layer_of(base[path], place) for path in paths}
        if name == "other":
            return {
                path: round_numbers(
                    own[path], place, held[path], self._axes(path)
                ).block_until_ready()
                for path in paths
            }
        return {
            path: self._found(path, place)
            if path in held
            else _layer_of(base[path], place)
            for path in paths
        }

    def _found(self, path: str, place: np.int32 | None) -> Array:
        """A parameter in the files, or a layer of it, compared with the run's."""
        numbers, spec = self.written.held[path], self.specs[path]
        value = self.written.read(path, () if place is None else (int(place),))
        value = value if place is None else value[None]
        found = self.placed(value, dataclasses.replace(spec, shape=value.shape))
        own, base = self.exported.weights[path], self.trained_base(path)
        sums = compare_numbers(own, base, found, place, numbers, self._axes(path))
        self.note(path if place is None else f"{path} of layer {place}", sums)
        if not numbers.is_update:
            return found
        return add_update(self.exported.base_weights[path], found, place)

    def trained_base(self, path: str) -> Matrix | None:
        """The base model's parameter, if the run has trained an adapter of it."""
        base = self.exported.base_weights
        return base.get(path) if path in self.exported.adapters else None

    def _axes(self, path: str) -> Axes:
        return Axes(self.specs[path].stacked, self.specs[path].n_in)

    def _end(self, path: str) -> dict[str, Array]:
        """The logits of all models, in pieces of the vocabulary."""
        head, sums = _Vocabulary(self, path), no_sums(self.rows.tokens.shape)
        for ids in head.pieces():
            head.compare(ids)
            logits = {
                name: state.programs[3](head.rows(name, ids), state.hidden)
                for name, state in self.states.items()
            }
            run, files = logits["run"], logits["files"]
            other = logits.get("other", run)
            same, changed = (run, other) if self.on_base else (other, other)
            sums = add_piece(sums, run, files, same, changed, ids[0])
            jax.block_until_ready(sums)  # Room for the next piece.
        return measures(sums, self.rows.segments > 0, np.int32(head.size))

    def note(self, path: str, sums: Mapping[str, Array]) -> None:
        found = {name: float(value) for name, value in sums.items()}
        old = self.sums.setdefault(path, dict.fromkeys(found, 0.0))
        for name, value in found.items():
            old[name] = (
                _largest(old[name], value) if name == "share" else (old[name] + value)
            )

    def placed(self, value: np.ndarray, spec: Spec) -> Array:
        """An array over the devices, split as its axes say."""
        if self.mesh is None:
            return jnp.asarray(value)
        sharding = meshes.shardings({"": spec}, self.mesh)[""]
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

    def _parity(self, sums: Mapping[str, Array], reasons: tuple[str, ...]) -> Parity:
        of = {name: float(value) for name, value in sums.items()}
        shares = {path: x["share"] for path, x in self.sums.items()}
        worst = max(shares, key=lambda path: (math.isnan(shares[path]), shares[path]))
        trained = {path: x for path, x in self.sums.items() if x.get("size")}
        kept = {path: x["kept"] / x["size"] for path, x in trained.items()}
        update = [math.sqrt(x["apart"] / x["size"]) for x in trained.values()]
        total = sum(x["size"] for x in trained.values())
        merged = trained and not self.on_base
        kinds = {x.kind for x in self.written.held.values()}
        return Parity(
            rows=self.rows.origin,
            tokens=int((self.rows.segments > 0).sum()),
            numbers=max(kinds, key=[*KINDS].index),
            architecture=reasons,
            weights=shares[worst],
            worst=worst,
            update=max(update, default=0.0) if self.on_base else None,
            kept=sum(x["kept"] for x in trained.values()) / total if merged else None,
            least_kept=min(kept, key=kept.__getitem__) if merged else "",
            experts=self.written.architecture.experts is not None,
            **{name: max(0.0, x) if name == "kl" else x for name, x in of.items()},
        )


class _Vocabulary:
    """The table of embeddings or the head, by rows of the vocabulary."""

    def __init__(self, proof: _Proof, path: str):
        self._proof, self._path = proof, path
        spec = proof.specs[path]
        self._is_head = path == HEAD
        self.size, self._width = reversed(spec.shape) if self._is_head else spec.shape
        self._held = proof.written.held.get(path)
        if self._held:
            # A piece has rows of the vocabulary, each a row of the file.
            self._held = dataclasses.replace(self._held, by_inputs=False)

    @functools.cached_property
    def _whole(self) -> np.ndarray:
        """All rows in the files, where these cannot be read one by one."""
        found = self._proof.written.read(self._path, ())
        return found.T if self._is_head else found

    def _found(self, ids: np.ndarray) -> np.ndarray:
        """Rows in the files; `ids` ascend."""
        if self._proof.written.read_rows is None:
            return self._whole[ids]
        if len(ids) == ids[-1] + 1 - ids[0]:
            part = slice(int(ids[0]), int(ids[-1]) + 1)
            return self._proof.written.read_rows(self._path, part)
        return np.concatenate([self._found(ids[i : i + 1]) for i in range(len(ids))])

    def pieces(self) -> Iterator[np.ndarray]:
        """Ids of the vocabulary, piece by piece."""
        count = math.ceil(self.size * self._width / PIECE)
        yield from np.array_split(np.arange(self.size, dtype=np.int32), count)

    def compare(self, ids: np.ndarray) -> None:
        """Notes how far these rows in the files are from the run's."""
        if self._held is None:
            return
        base = self._proof.trained_base(self._path)
        base = None if base is None else _rows_of(base, ids, self._is_head)
        own = self._rows(self._proof.exported.weights, ids)
        found = self._placed(ids)
        sums = compare_numbers(own, base, found, None, self._held, ROWS)
        self._proof.note(self._path, sums)

    def rows(self, name: str, ids: np.ndarray) -> Any:
        """Rows `[n, D]` of one of the models."""
        exported, held = self._proof.exported, self._held
        if name == "run":
            return self._rows(exported.weights, ids)
        if held is None or (name == "other" and self._proof.on_base):
            return self._rows(exported.base_weights, ids)
        if name == "other":
            own = self._rows(exported.weights, ids)
            return round_numbers(own, None, held, ROWS)
        if held.is_update:
            base = self._rows(exported.base_weights, ids)
            return add_update(base, self._placed(ids), None)
        return self._placed(ids)

    def _rows(self, leaves: Leaves, ids: np.ndarray) -> Matrix:
        return _rows_of(leaves[self._path], ids, self._is_head)

    def _placed(self, ids: np.ndarray) -> Array:
        shape = (len(ids), self._width)
        return self._proof.placed(self._found(ids), Spec(shape, ("positions", "embed")))


def _largest(one: float, other: float) -> float:
    """The larger number; one that is none counts as the largest."""
    return one if math.isnan(one) or one > other else other


def _mesh_of(weights: Leaves) -> Mesh | None:
    """The mesh over which the parameters are split; None on one device."""
    where = jax.tree.leaves(dict(weights))[0].sharding
    return where.mesh if isinstance(where, NamedSharding) else None
