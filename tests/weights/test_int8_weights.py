"""A matrix in bytes stands for the matrix that was rounded, in every use of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, close, mesh_sizes, random_params

from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.weights.contraction import contract, lookup, materialize, transpose
from research.weights.parameter_spec import Spec
from research.weights.quantized.int8_weights import (
    Int8Matrix,
    as_int8,
    int8_specs,
    with_byte_products,
)

SHAPES = {
    "plain": Spec((40, 56), ("embed", "mlp")),
    "out": Spec((40, 4, 10), ("embed", "heads", "head_dim")),
    "in": Spec((4, 10, 40), ("heads", "head_dim", "embed"), n_in=2),
    "stacked": Spec(
        (3, 40, 4, 10), ("layers", "embed", "heads", "head_dim"), stacked=1
    ),
    "table": Spec((96, 40), ("vocab", "embed")),
}


def drawn(shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("name", SHAPES)
def test_each_weight_is_within_half_a_step_of_its_channel(name):
    spec = SHAPES[name]
    # Channels of very different size, and one of zeros.
    sizes = np.logspace(-6, 3, spec.shape[-1], dtype=np.float32)
    weight = np.array(drawn(spec.shape)) * sizes
    weight[..., 0] = 0
    made = as_int8(weight, spec)
    described = int8_specs(spec)
    assert made.shape == spec.shape == described.shape
    assert jax.tree.map(lambda x, y: x.shape == y.shape, made, described).codes
    assert (made.codes.dtype, made.scale.dtype) == ("int8", "float32")
    assert made.codes.max() == 127 and made.codes.min() >= -127
    axes = (
        (1,)
        if name == "table"
        else tuple(range(spec.stacked, spec.stacked + spec.n_in))
    )
    step = np.abs(weight).max(axis=axes, keepdims=True) / 127
    assert (np.abs(materialize(made) - weight) <= 0.5001 * step).all()
    # A matrix that is in steps already is kept exactly.
    again = as_int8(materialize(made), spec)
    np.testing.assert_array_equal(again.codes, made.codes)


@pytest.mark.parametrize("name", ["plain", "out", "in", "table"])
def test_products_and_rows_are_those_of_the_rounded_matrix(name):
    spec = SHAPES[name]
    made = as_int8(drawn(spec.shape), spec)
    whole = materialize(made)
    x = drawn((2, 3, *spec.in_shape), 1)
    if name != "table":
        # On a CPU the inputs are rounded to 8 bits, too: here they are so already.
        steps = 127 / np.abs(x).max(axis=tuple(range(2, x.ndim)), keepdims=True)
        x = np.round(x * steps) / steps
    close(contract(x, made, spec.n_in), np.tensordot(x, whole, spec.n_in))
    assert contract(x.astype(jnp.bfloat16), made, spec.n_in).dtype == jnp.bfloat16
    assert contract(x.astype(jnp.bfloat16), made, spec.n_in, jnp.float32).dtype == (
        jnp.float32
    )
    if len(spec.shape) == 2:
        ids = jnp.array([[0, 39], [7, 7]])
        close(lookup(made, ids, jnp.float32), whole[ids])
        back = transpose(made)
        assert back.shape == whole.T.shape
        close(materialize(back), whole.T)
        close(lookup(back, ids, jnp.float32), whole.T[ids])
        y = np.round(drawn((3, spec.shape[1]), 2) * 30)
        y = y.at[:, 0].set(127)  # So a step of the inputs is 1.
        close(contract(y, back), y @ whole.T)


def in_bytes(x, axes):
    """Whole numbers up to 127 and their step, by row."""
    step = np.abs(x).max(axis=axes, keepdims=True) / 127
    return np.rint(x / step), step


@pytest.mark.parametrize("name", ["plain", "out", "in"])
def test_products_of_bytes_and_their_gradients_follow_the_plain_formula(name):
    spec = SHAPES[name]
    n_in, n_out = spec.n_in, len(spec.shape) - spec.n_in
    plain = as_int8(drawn(spec.shape), spec)
    made = with_byte_products({"a": plain})["a"]
    whole = np.float64(materialize(plain))
    x, d_y = drawn((2, 3, *spec.in_shape), 1), drawn((2, 3, *spec.shape[n_in:]), 2)
    found, back = jax.vjp(lambda x: contract(x, made, n_in), x)
    codes, step = in_bytes(np.float64(x), tuple(range(2, x.ndim)))
    close(found, np.tensordot(codes * step, whole, n_in), rtol=1e-5)
    # The scales of the outputs are part of what is rounded.
    scales = np.float64(plain.scale)
    codes, step = in_bytes(np.float64(d_y) * scales, tuple(range(2, d_y.ndim)))
    steps_of_w = np.moveaxis(np.float64(plain.codes), range(n_out), range(-n_out, 0))
    out_axes = (range(2, 2 + n_out), range(n_in, n_in + n_out))
    close(back(d_y)[0], np.tensordot(codes * step, steps_of_w, out_axes), rtol=1e-5)
    # Against the same codes with inputs as they are, in each norm within 2 %.
    expected, plain_back = jax.vjp(lambda x: contract(x, plain, n_in), x)
    for got, exact in ((found, expected), (back(d_y)[0], plain_back(d_y)[0])):
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.02
    narrow = contract(x.astype(jnp.bfloat16), made, n_in)
    assert narrow.dtype == jnp.bfloat16
    gradient = jax.grad(lambda x: contract(x, made, n_in, jnp.float32).sum())
    assert gradient(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_products_of_bytes_keep_zeros_and_show_what_is_not_finite():
    made = with_byte_products(as_int8(drawn((40, 56)), SHAPES["plain"]))
    x = jnp.stack([jnp.zeros(40), jnp.ones(40).at[3].set(jnp.inf), jnp.ones(40)])
    found, back = jax.vjp(lambda x: contract(x, made), x)
    assert (found[0] == 0).all() and np.isfinite(found[2]).all()
    assert not np.isfinite(found[1]).any()
    gradient = back(jnp.zeros((3, 56)).at[1, 0].set(jnp.nan))[0]
    assert (gradient[0] == 0).all() and np.isnan(gradient[1]).all()


def test_products_of_bytes_are_the_same_over_every_mesh():
    """Sums of bytes are exact, whichever devices make their parts."""
    spec = SHAPES["in"]
    made = with_byte_products(as_int8(drawn(spec.shape), spec))
    x, d_y = drawn((8, 3, *spec.in_shape), 1), drawn((8, 3, 40), 2)

    @jax.jit
    def both(x, w, d_y):
        y, back = jax.vjp(lambda x: contract(x, w, 2), x)
        return y, back(d_y)[0]

    mesh = meshes.make_mesh(mesh_sizes(fsdp=2, tensor=4))
    described = with_byte_products({"w": int8_specs(spec)})
    placed = jax.device_put({"w": made}, meshes.shardings(described, mesh))["w"]
    assert len(placed.codes.sharding.device_set) == 8
    for found, expected in zip(both(x, placed, d_y), both(x, made, d_y), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_row_does_not_depend_on_its_neighbours():
    """Each row of inputs has a scale of its own; sums of bytes are exact."""
    made = as_int8(drawn((40, 56)), SHAPES["plain"])
    x = drawn((8, 40), 1)
    product = jax.jit(contract)
    found = product(x, made)
    for row in (0, 7):
        others = (x * 1e4).at[row].set(x[row])
        np.testing.assert_array_equal(product(others, made)[row], found[row])


def test_a_model_in_bytes_is_near_the_model_also_over_eight_devices():
    model = Model(TINY)
    params = random_params(model.specs)
    matrices = [path for path, spec in model.specs.items() if spec.n_in]
    small = params | {
        path: as_int8(params[path], model.specs[path]) for path in matrices
    }
    tokens = np.random.default_rng(0).integers(0, TINY.vocab, (8, 6), np.int32)

    @jax.jit
    def logits(params):
        at = jnp.broadcast_to(jnp.arange(6), tokens.shape)
        hidden = model.hidden(params, tokens, at, jnp.ones_like(tokens))
        return model.logits(params, hidden)

    whole, found = logits(params), logits(small)
    assert 0 < np.abs(found - whole).max() < 0.05 * np.abs(whole).max()
    mesh = meshes.make_mesh(mesh_sizes(fsdp=2, tensor=4))
    specs = {p: int8_specs(s) if s.n_in else s for p, s in model.specs.items()}
    placed = jax.device_put(small, meshes.shardings(specs, mesh))
    up = placed["layers.mlp.up.kernel"]
    assert isinstance(up, Int8Matrix) and up.codes.sharding.spec[1:] == (
        "tensor",
        "fsdp",
    )
    # A sum in another order may move an input across the border of two steps.
    close(logits(placed), found, rtol=0.02)
