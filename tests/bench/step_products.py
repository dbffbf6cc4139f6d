"""The matrix products that a training step is made of: kinds, shapes, FLOPs and bytes.

They are the parts of the sum that `throughput.FlopCount` gives for a step, and what
`step_flops.recomputed` adds to it. Sizes of matrices come from the specs of the model.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.plan.abstract_step import AbstractStep
from research.weights.parameter_spec import Spec

# How `jnp.einsum` writes `[m, k] @ [k, n]`, with the right factor as it is or turned. A
# left factor that must be turned first is a copy beside its product.
PLAIN, TURNED = "bmk,bkn->bmn", "bmk,bnk->bmn"
FORWARD, INPUTS, WEIGHTS, ADAPTERS, ATTENTION, HEAD, AGAIN = (
    "weights, forward",
    "weights, gradients of inputs",
    "weights, gradients of weights",
    "adapters",
    "attention",
    "vocabulary head",
    "computed again",
)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two matrices, or of a batch of pairs of them.

    Attributes:
      kind: what it is for, one of the names above.
      layout: of the factors, one of those above.
      m, k, n: sizes of `[m, k] @ [k, n]`.
      times: how often a step needs it. A fraction counts only the part of a block
        that the mathematics needs.
      batch: pairs.
      wide: the result is float32, whatever the factors are.
    """

    kind: str
    layout: str
    m: int
    k: int
    n: int
    times: float
    batch: int = 1
    wide: bool = False

    @property
    def alone(self) -> "Product":
        """The product once, without its kind: what its seconds depend on."""
        return dataclasses.replace(self, kind="", times=1.0)

    @property
    def flops(self) -> float:
        """FLOPs of a step."""
        return 2.0 * self.batch * self.m * self.k * self.n * self.times

    def nbytes(self, dtype: str) -> float:
        """Bytes of a step, if each product reads its factors and writes its result."""
        size = jnp.dtype(dtype).itemsize
        factors = size * (self.m * self.k + self.k * self.n)
        result = (4 if self.wide else size) * self.m * self.n
        return self.batch * self.times * (factors + result)

    def factors(self, dtype: str) -> list[jax.Array]:
        """Random factors."""
        right = (self.k, self.n) if self.layout == PLAIN else (self.n, self.k)
        return [
            jax.random.normal(jax.random.key(i), (*self._pairs, *shape), dtype)
            for i, shape in enumerate(((self.m, self.k), right))
        ]

    def compute(self, left: jax.Array, right: jax.Array) -> jax.Array:
        dtype = jnp.float32 if self.wide else left.dtype
        layout = self.layout if self._pairs else self.layout.replace("b", "")
        return jnp.einsum(layout, left, right, preferred_element_type=dtype)

    @property
    def _pairs(self) -> tuple[int, ...]:
        """The axis that counts pairs, if there are several."""
        return (self.batch,) if self.batch > 1 else ()


def products_of(step: AbstractStep, weight: float, pairs: float) -> list[Product]:
    """The products of a step whose rows have no padding.

    Args:
      step: of a dense model; adapters are LoRA's.
      weight: positions with a loss.
      pairs: of a query and a key that it sees.

    Raises:
      UserError: the model has experts, or the adapters are of another kind.
    """
    kind = step.definition.trainable.kind
    if step.architecture.experts or (kind and kind.name != "lora"):
        raise UserError(
            "only the products of dense models that are trained whole or with "
            "config.lora.kind=lora are known; choose another --config or --preset"
        )
    return [*_of_layers(step), *_of_attention(step, pairs), *_of_head(step, weight)]


def _of_layers(step: AbstractStep) -> Iterator[Product]:
    """Those with the matrices of layers and their factors."""
    split = step.definition.trainable
    for path, spec in step.definition.model.specs.items():
        if spec.stacked and spec.n_in:
            is_trained = not split.frozen_specs or path in split.full
            yield from _of_matrix(step, spec, is_trained)
    for factors in split.specs.values():
        for spec in factors.values() if isinstance(factors, dict) else ():
            yield from _of_matrix(step, spec, True, ADAPTERS)


def _of_matrix(
    step: AbstractStep, spec: Spec, is_trained: bool, kind: str = ""
) -> Iterator[Product]:
    """Those of a matrix in all passes; the result, its inputs' and its own gradient."""
    layers, k, n = spec.as_matrix.shape
    m = step.tokens // step.passes
    times = layers * step.passes
    yield Product(kind or FORWARD, PLAIN, m, k, n, times)
    yield Product(kind or INPUTS, TURNED, m, n, k, times)
    if is_trained:
        yield Product(kind or WEIGHTS, PLAIN, k, m, n, times)
    if step.config.model.remat == "full":
        yield Product(AGAIN, PLAIN, m, k, n, times)


def _of_attention(step: AbstractStep, pairs: float) -> Iterator[Product]:
    """Scores and mixed values, and their gradients, block by block."""
    a, data = step.architecture, step.config.data
    block = min(step.config.model.attention_block, data.seq_len)
    batch = data.rows_per_pass * a.kv_heads
    rows = a.heads // a.kv_heads * block
    # Each of these products of a step needs 2 FLOPs for a pair and a number of a head.
    times = pairs * a.layers / (data.rows_per_pass * block * block)
    scores = Product(ATTENTION, TURNED, rows, a.head_dim, block, times, batch, True)
    mix = Product(ATTENTION, PLAIN, rows, block, a.head_dim, times, batch, True)
    back = Product(ATTENTION, PLAIN, block, rows, a.head_dim, times, batch, True)
    # The weights' gradient is a product as the scores are, the queries' one as the
    # mixed values, and those of keys and values sum over queries.
    yield from (scores, mix, scores, mix, back, back)
    repeated = (scores,) if step.config.model.remat == "none" else (scores, scores, mix)
    for product in repeated:
        yield dataclasses.replace(product, kind=AGAIN)


def _of_head(step: AbstractStep, weight: float) -> Iterator[Product]:
    """Those with the vocabulary head, chunk by chunk."""
    a, split = step.architecture, step.definition.trainable
    most = step.config.data.rows_per_pass * step.config.data.seq_len
    chunk = min(step.definition.objective.positions(a.vocab), most)
    times, tied = weight / chunk, a.tied_head
    to_logits, back = (TURNED, PLAIN) if tied else (PLAIN, TURNED)
    yield Product(HEAD, to_logits, chunk, a.embed, a.vocab, times, wide=True)
    yield Product(HEAD, back, chunk, a.vocab, a.embed, times)
    model = step.definition.model
    if not split.frozen_specs or not split.full.isdisjoint(model.head(model.specs)):
        m, n = (a.vocab, a.embed) if tied else (a.embed, a.vocab)
        yield Product(HEAD, PLAIN, m, chunk, n, times)
