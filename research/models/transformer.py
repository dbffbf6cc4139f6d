"""The decoder in Flax NNX, and the pure functions that the rest of the code calls.

NNX ends here: above this file a model is `Model.apply(params, ...)` on a flat
dictionary `{"layers.mlp.up.kernel": leaf, ...}` whose leaves are arrays or any
other `Matrix`. There is one Block; what a family changes in it is a switch
of `Architecture`. Axis letters: see `attention.py`.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import look_up
from research.models.architecture import Architecture
from research.models.attention import PLAIN, ScoreRule, cap
from research.models.attention_kernels import packed_attention
from research.models.cached_attention import attend_cached, room_for
from research.models.families.family_registry import module_names
from research.models.parts.block import (
    Block,
    LayerKind,
    kinds_of_layers,
    make_norm,
    rule_of,
)
from research.models.parts.expert_dispatch import mix_experts
from research.models.parts.experts import ExpertLoad
from research.models.parts.layers import Embedding, Linear, Parameter
from research.models.parts.rotary import Tables, tables_of_layers
from research.weights.contraction import contract, transpose
from research.weights.parameter_spec import Spec
from research.weights.representations.grouped_product import GROUPED_PRODUCT
from research.weights.representations.leaf import Matrix

Array = jax.Array
Params = dict[str, Any]

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(GROUPED_PRODUCT),
    ),
}


def attend_whole_rows(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array,
    rule: ScoreRule = PLAIN,
) -> Array:
    """Attention by the `xla` kernel, of rows that one device holds entirely."""
    arrays = (q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT)
    return packed_attention(*arrays, kernel="xla", block=128, rule=rule)


@dataclasses.dataclass(frozen=True)
class Options:
    """How the model is computed; no option changes its results beyond rounding.

    Attributes:
      dtype: of activations, and of weights inside a matrix product.
      remat: how much the backward pass recomputes; a key of `REMAT_POLICIES`.
      scan_unroll: layers per iteration of the scan; with all layers, there is no loop.
      attend: attention of packed rows, `attend(q_BTNH, k_BTKH, v_BTKH, segments_BT)`,
        with a `ScoreRule` as last argument in models whose scores are not plain.
      attend_cached: attention of decoding, as `cached_attention.attend_cached`.
      mix_experts: the experts of all tokens, as `expert_dispatch.mix_experts`.
      constrain: fixes the sharding of an activation by its axis names.
      constrain_cached: fixes that of hidden states `[B, T, D]` of decoding.
      keep: is given the keys and values `[L, B, T, K, H]` of packed rows while `hidden`
        is traced, as a cache for decoding holds them; None: nobody needs them.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    attend: Callable[..., Array] = attend_whole_rows
    attend_cached: Callable[..., tuple[Array, Array, Array]] = attend_cached
    mix_experts: Callable[..., Array] = mix_experts
    constrain: Callable[[Array, Sequence[str]], Array] = lambda x, axes: x
    constrain_cached: Callable[[Array], Array] = lambda x: x
    keep: Callable[[Array, Array], None] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for decoding.

    Attributes:
      k, v: `[L, S, K, C, H]`: S rows, called slots, each with room for C tokens.
      length: int32 `[S]`, tokens that each slot holds; token i has position i.
    """

    k: Array
    v: Array
    length: Array


class Transformer(nnx.Module):
    """Embedding, blocks, norm and head, with random initial values.

    Matrices are normal with variance 1 / fan-in (LeCun et al. 1998, section 4.6);
    those whose output is added to the residual stream are smaller by sqrt(2 * layers),
    so that the stream does not grow with depth (Radford et al. 2019, GPT-2,
    section 2.3).
    """

    def __init__(self, a: Architecture, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=a.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_layers(rngs: nnx.Rngs) -> Block:
            return Block(a, rngs)

        # Most small models tie the head, so std must suit both logits and inputs.
        table = Spec((a.vocab, a.embed), ("vocab", "embed"), std=a.embed**-0.5)
        self.embedding = Embedding(table, rngs)
        self.layers = make_layers(rngs)
        self.final_norm = make_norm(a, (a.embed,), ("norm",), rngs)
        if a.positions == "learned":
            places = Spec((a.max_position, a.embed), ("positions", "embed"))
            self.position_embedding = Embedding(places, rngs)
        if not a.tied_head:
            head = Spec((a.embed, a.vocab), ("embed", "vocab"), std=a.embed**-0.5)
            self.head = Linear(head, rngs)
        self.architecture = a

    def hidden(self, tokens_BT, positions_BT, segments_BT, options: Options):
        x_BTD = self.embed(tokens_BT, positions_BT, options.dtype)
        kinds = kinds_of_layers(self.architecture)
        x_BTD, load = self.through(x_BTD, positions_BT, segments_BT, kinds, options)
        return self.final_norm(x_BTD), load

    def through(
        self, x_BTD, positions_BT, segments_BT, kinds: LayerKind, options: Options
    ) -> tuple[Array, ExpertLoad | None]:
        """The layers that `self.layers` holds, which are of these kinds."""
        a = self.architecture
        ropes = self._ropes(positions_BT, positions_BT.shape[1])
        graph, layers = nnx.split(self.layers)

        # Otherwise the partitioner may split activations like the weights.
        def pin(x_BTD):
            return options.constrain(x_BTD, ("batch", "length", "hidden"))

        def body(x_BTD, layer_and_kind):
            layer, kind = layer_and_kind

            def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N):
                rule = rule_of(a, kind, sinks_N)
                mixed = options.attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, *rule)
                return mixed, (k_BTKH, v_BTKH) if options.keep else None

            rope, real_BT = _rope_of(ropes, kind), segments_BT != 0
            x_BTD, kept, load = nnx.merge(graph, layer)(
                x_BTD, rope, attend, options.mix_experts, real_BT
            )
            return pin(x_BTD), (load, kept)

        policy = look_up(REMAT_POLICIES, options.remat, "config.model.remat")
        if policy is not None:
            # Inside a scan, the barrier against common-subexpression elimination is
            # unnecessary and slow.
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        each = layers, kinds
        x_BTD, (load, kept) = jax.lax.scan(
            body, pin(x_BTD), each, unroll=options.scan_unroll
        )
        if options.keep:
            options.keep(*kept)
        return x_BTD, load

    def decode(self, tokens_BT, cache: Cache, slot, options: Options):
        a = self.architecture
        batch, length = tokens_BT.shape
        start_B = jax.lax.dynamic_slice_in_dim(cache.length, slot, batch)
        positions_BT = start_B[:, None] + jnp.arange(length)[None]
        ropes = self._ropes(positions_BT, cache.k.shape[3])
        graph, layers = nnx.split(self.layers)

        # The cache is carried, so that each layer writes into the one buffer.
        def body(carry, layer_number_and_kind):
            x_BTD, k, v = carry
            layer, number, kind = layer_number_and_kind

            def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N):
                new = (q_BTNH, k_BTKH, v_BTKH)
                at = (number, slot, start_B, *rule_of(a, kind, sinks_N))
                mixed, *kept = options.attend_cached(*new, k, v, *at)
                return mixed, kept

            rope = _rope_of(ropes, kind)
            block = nnx.merge(graph, layer)
            x_BTD, (k, v), _ = block(x_BTD, rope, attend, options.mix_experts)
            return (options.constrain_cached(x_BTD), k, v), None

        x_BTD = self.embed(tokens_BT, positions_BT, options.dtype)
        x_BTD = options.constrain_cached(x_BTD)
        each = layers, jnp.arange(a.layers), kinds_of_layers(a)
        (x_BTD, k, v), _ = jax.lax.scan(body, (x_BTD, cache.k, cache.v), each)
        filled = jax.lax.dynamic_update_slice_in_dim(
            cache.length, start_B + length, slot, 0
        )
        return self.final_norm(x_BTD), Cache(k=k, v=v, length=filled)

    def embed(self, tokens_BT: Array, positions_BT: Array, dtype: Any) -> Array:
        a = self.architecture
        x_BTD = self.embedding(tokens_BT, dtype)
        if a.embedding_scale != 1.0:
            # Rounded to the dtype of the embeddings, as Gemma was trained.
            x_BTD *= jnp.asarray(a.embedding_scale, dtype)
        if a.positions == "learned":
            # An idle slot of an engine may stand behind the last position.
            places_BT = jnp.minimum(positions_BT, a.max_position - 1)
            x_BTD += self.position_embedding(places_BT, dtype)
        return x_BTD

    def _ropes(self, positions_BT: Array, room: int) -> Tables | None:
        a = self.architecture
        return tables_of_layers(a.ropes, positions_BT, a.head_dim, room)


def _rope_of(ropes: Tables | None, kind: LayerKind) -> Tables | None:
    """The tables of one layer, out of those of all."""
    if kind.rope is None:
        return ropes
    return jax.tree.map(lambda tables: tables[kind.rope], ropes)


class Model:
    """The decoder as pure functions of a flat parameter dictionary.

    Attributes:
      specs: `{path: Spec}` for every parameter, in the order of the paths.
    """

    def __init__(self, architecture: Architecture, options: Options = Options()):
        self.architecture = architecture
        self.options = options
        self._graph, self._variables = _abstract(architecture)
        specs = {
            ".".join(path): _stacked_spec(variable)
            for path, variable in sorted(self._variables.items())
        }
        names = module_names(architecture)
        self.specs = {
            path: dataclasses.replace(spec, names=names.get(path, ()))
            for path, spec in specs.items()
        }
        tied = architecture.tied_head
        self._head_path = "embedding.table" if tied else "head.kernel"

    def with_options(self, **changes: Any) -> "Model":
        """The same architecture with some options changed."""
        other = copy.copy(self)
        other.options = dataclasses.replace(self.options, **changes)
        return other

    def init(self, key: Array) -> Params:
        """Random float32 parameters."""
        module = Transformer(self.architecture, nnx.Rngs(key))
        flat = nnx.to_flat_state(nnx.split(module)[1])
        return {".".join(path): variable.get_value() for path, variable in flat}

    def hidden(
        self, params: Params, tokens_BT: Array, positions_BT: Array, segments_BT: Array
    ) -> Array:
        """Final hidden states `[B, T, D]` of packed rows, in `options.dtype`."""
        return self.hidden_and_load(params, tokens_BT, positions_BT, segments_BT)[0]

    def hidden_and_load(
        self, params: Params, tokens_BT: Array, positions_BT: Array, segments_BT: Array
    ) -> tuple[Array, ExpertLoad | None]:
        """As `hidden`, with the load `[L, E]` of experts; None in a model without."""
        module = self._bind(params)
        return module.hidden(tokens_BT, positions_BT, segments_BT, self.options)

    def embed(self, params: Params, tokens_BT: Array, positions_BT: Array) -> Array:
        """The input of the first layer, `[B, T, D]`; reads only embeddings."""
        module = self._bind(params, whole=False)
        return module.embed(tokens_BT, positions_BT, self.options.dtype)

    def layer(
        self,
        params: Params,
        number: Array | int,
        x_BTD: Array,
        positions_BT: Array,
        segments_BT: Array,
    ) -> Array:
        """The output of layer `number` for `x_BTD`; `params` has this layer alone.

        Its arrays are stacked over this one layer. A caller may so run a model that is
        never in memory as a whole.
        """
        kinds = kinds_of_layers(self.architecture)
        own = jax.tree.map(lambda x: x[number][None], kinds)
        module = self._bind(params, whole=False)
        return module.through(x_BTD, positions_BT, segments_BT, own, self.options)[0]

    def final_norm(self, params: Params, x_BTD: Array) -> Array:
        """Hidden states as `logits` reads them, from the output of the last layer."""
        return self._bind(params, whole=False).final_norm(x_BTD)

    def head(self, params: Params) -> Params:
        """The part of `params` that `logits` reads: the vocabulary head alone."""
        return {self._head_path: params[self._head_path]}

    def logits(self, params: Params, hidden: Array) -> Array:
        """Scores of every id, float32 `[*batch, V]`, from `[*batch, D]` hidden states.

        The only way from the one to the other. The product gives float32 whatever
        goes into it: in bfloat16, logits in [16, 32) would lie 0.125 apart. A family's
        divisor and soft cap of logits are applied here. `params` may be all of the
        model's or `head(params)`.
        """
        a = self.architecture
        head: Matrix = params[self._head_path]
        if a.tied_head:
            head = transpose(head)
        logits = contract(hidden, head, dtype=jnp.float32)
        if a.logit_divisor != 1.0:
            logits /= a.logit_divisor
        return cap(logits, a.logit_softcap)

    def keys_seen(self, positions_BT: Array) -> Array:
        """The keys that each token sees, as a mean over layers: windows see fewer."""
        a = self.architecture
        seen = positions_BT + 1.0
        if not any(a.windows):
            return seen
        share = sum(window > 0 for window in a.windows) / a.layers
        return (1 - share) * seen + share * jnp.minimum(seen, a.window)

    def init_cache(self, slots: int, length: int) -> Cache:
        """An empty cache for `length` tokens a slot, in `options.dtype`."""
        a = self.architecture
        shape = (a.layers, slots, a.kv_heads, room_for(length), a.head_dim)
        # Two buffers: one that stands for both could not be donated.
        k, v = (jnp.zeros(shape, self.options.dtype) for _ in range(2))
        return Cache(k=k, v=v, length=jnp.zeros(slots, jnp.int32))

    def decode(
        self,
        params: Params,
        tokens_BT: Array,
        cache: Cache,
        slot: Array | int = 0,
    ) -> tuple[Array, Cache]:
        """Hidden states `[B, T, D]` of the next T tokens, and the longer cache.

        Row b continues slot `slot + b`. There must be room for T more tokens.
        """
        slot = jnp.asarray(slot, jnp.int32)
        return self._bind(params).decode(tokens_BT, cache, slot, self.options)

    def _bind(self, params: Params, whole: bool = True) -> Transformer:
        """The module with these values; without `whole` others may stay abstract."""
        if whole and params.keys() != self.specs.keys():
            odd = sorted(params.keys() ^ self.specs.keys())
            raise ValueError(f"parameters and model differ in: {', '.join(odd)}")
        state = nnx.from_flat_state(
            [
                (
                    path,
                    variable.replace(params.get(".".join(path), variable.get_value())),
                )
                for path, variable in self._variables.items()
            ]
        )
        return nnx.merge(self._graph, state)


@functools.cache  # The planner makes the same model dozens of times.
def _abstract(a: Architecture) -> tuple[Any, dict[tuple[str, ...], Any]]:
    """The module's graph, and its variables with shapes in place of values."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(a, nnx.Rngs(0))))
    return graph, dict(nnx.to_flat_state(state))


def _stacked_spec(variable: Parameter) -> Spec:
    """The spec of a stacked value; the metadata hold that of one layer."""
    spec: Spec = variable.get_metadata()["spec"]
    stacked = len(variable.get_value().shape) - len(spec.shape)
    return dataclasses.replace(
        spec,
        shape=tuple(variable.get_value().shape),
        axes=("layers",) * stacked + spec.axes,
        stacked=stacked + spec.stacked,
    )
