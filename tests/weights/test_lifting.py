"""`lift` on real modules of Flax: attention, and layers that `scan` stacks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import close, random_adapters

from research.config.run_config import LoRAConfig
from research.core.errors import UserError
from research.weights import parameter_paths
from research.weights.adapters.adapter_registry import find_kind
from research.weights.adapters.lifting import MatrixAxes, lift, specs_of

HEADS, WIDTH, LAYERS = 4, 32, 3  # A head has 8 numbers.
KERNELS = LoRAConfig(rank=2, alpha=4.0, targets=("kernel",))


class Block(linen.Module):
    use_bias: bool = True

    @linen.compact
    def __call__(self, x, _):
        own = {"use_bias": self.use_bias}
        y = linen.LayerNorm(name="norm")(x)
        x += linen.MultiHeadDotProductAttention(HEADS, **own, name="attention")(y)
        return x + linen.Dense(WIDTH, **own, name="dense")(linen.relu(x)), None


class Stack(linen.Module):
    use_bias: bool = True

    @linen.compact
    def __call__(self, x):
        scanned = linen.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return scanned(self.use_bias, name="layers")(x, None)[0]


def linen_attention(**changes):
    return linen_model(linen.MultiHeadDotProductAttention(HEADS, **changes))


def linen_model(model):
    x = jnp.zeros((1, 3, WIDTH))
    return model.apply, jax.jit(model.init)(jax.random.key(0), x)


def nnx_attention(**changes):
    model = nnx.MultiHeadAttention(
        HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0), **changes
    )
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state)(x), state


def named(specs):
    """`{(module, name): (stacked, n_in)}`, the same for both libraries."""
    found = {}
    for path, spec in specs.items():
        module, name = path.removesuffix(".value").split(".")[-2:]
        found[module, name] = spec.stacked, spec.n_in
    return found


def attention_axes(stacked):
    inputs = {"query": 1, "key": 1, "value": 1, "out": 2}
    return {(module, "kernel"): (stacked, n) for module, n in inputs.items()}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("make", [linen_attention, nnx_attention])
def test_attention_has_its_inputs_outputs_and_biases(make, use_bias):
    specs = named(specs_of(make(use_bias=use_bias)[1], KERNELS))
    kernels = {x: axes for x, axes in specs.items() if x[1] == "kernel"}
    assert kernels == attention_axes(0)
    assert {n_in for x, (_, n_in) in specs.items() if x not in kernels} <= {0}
    assert len(specs) == (8 if use_bias else 4)


@pytest.fixture(scope="module")
def stack():
    return linen_model(Stack())


def test_layers_of_a_scan_are_stacked_and_may_be_chosen(stack):
    config = dataclasses.replace(KERNELS, layers="0,2")
    specs = specs_of(stack[1], config)
    kernels = {x: axes for x, axes in named(specs).items() if x[1] == "kernel"}
    assert kernels == attention_axes(1) | {("dense", "kernel"): (1, 1)}
    assert not any(s.n_in for path, s in specs.items() if not path.endswith("kernel"))
    start = find_kind("lora").init(jax.random.key(0), specs, config)
    for path, own in start.items():
        assert own["a"].shape == (*specs[path].shape[: 1 + specs[path].n_in], 2)
        assert [bool(np.any(x)) for x in own["a"]] == [True, False, True], path


def test_without_biases_names_tell_the_axes_of_scanned_attention_alone():
    x = jnp.zeros((1, 3, WIDTH))
    shapes = jax.eval_shape(Stack(use_bias=False).init, jax.random.key(0), x)
    with pytest.raises(
        UserError, match=r"of params.layers.dense.kernel \[3, 32, 32\]:"
    ):
        specs_of(shapes, KERNELS)
    specs = named(specs_of(shapes, KERNELS, {"dense": MatrixAxes(1, stacked=1)}))
    kernels = {x: axes for x, axes in specs.items() if x[1] == "kernel"}
    assert kernels == attention_axes(1) | {("dense", "kernel"): (1, 1)}


def merged_by_hand(base, own, spec, kind, scale):
    """Each layer as one matrix `[in, out]`."""
    rows, rank = spec.as_matrix.shape[-2:], own["a"].shape[-1]
    whole = base.reshape(-1, *rows)
    a, b = own["a"].reshape(-1, rows[0], rank), own["b"].reshape(-1, rank, rows[1])
    whole = whole + scale * a @ b
    if kind == "dora":
        lengths = np.linalg.norm(whole, axis=1, keepdims=True)
        whole = own["magnitude"].reshape(-1, 1, rows[1]) * whole / lengths
    return whole.reshape(base.shape)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("make", ["stack", nnx_attention])
def test_a_lifted_model_computes_with_each_matrix_changed(make, kind, request):
    function, params = request.getfixturevalue(make) if make == "stack" else make()
    config = dataclasses.replace(KERNELS, kind=kind)
    specs = specs_of(params, config)
    base, structure = parameter_paths.flatten(params)
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 5, WIDTH)))
    lifted = jax.jit(lift(function, config))
    start = find_kind(kind).init(jax.random.key(0), specs, config, base)
    expected = jax.jit(function)(params, x)
    close(lifted(params, start, x), expected)
    adapters = random_adapters(find_kind(kind).specs(specs, config))
    assert len(adapters) == (5 if make == "stack" else 4)
    by_hand = dict(base)
    for path, own in adapters.items():
        by_hand[path] = merged_by_hand(base[path], own, specs[path], kind, 4.0 / 2)
    other = jax.jit(function)(parameter_paths.unflatten(structure, by_hand), x)
    found = lifted(params, adapters, x)
    close(found, other, rtol=1e-4)
    assert np.abs(found - expected).max() > 0.1


def test_a_kernel_that_may_be_read_in_two_ways_is_the_callers_to_read():
    params = {
        "scanned": {"kernel": jnp.zeros((3, 8, 6))},
        "square": {"kernel": jnp.zeros((4, 4, 8)), "bias": jnp.zeros((4, 8))},
        "conv": {"kernel": jnp.zeros((3, 3, 8, 6)), "bias": jnp.zeros(6)},
        "table": {"embedding": jnp.zeros((3, 9, 8))},
    }
    said = (
        r"inputs, .* of scanned.kernel \[3, 8, 6\], square.kernel \[4, 4, 8\]: .*"
        r"MatrixAxes\(n_in, stacked\)"
    )
    with pytest.raises(UserError, match=said):
        specs_of(params, KERNELS)
    axes = {"scanned": MatrixAxes(1, stacked=1), "square.kernel": MatrixAxes(1)}
    specs = specs_of(params, KERNELS, axes)
    assert {path: (x.stacked, x.n_in) for path, x in specs.items() if x.n_in} == {
        "scanned.kernel": (1, 1),
        "square.kernel": (0, 1),
        "conv.kernel": (0, 3),
    }
    with pytest.raises(UserError, match=r"'squere' matches no parameter"):
        specs_of(params, KERNELS, axes | {"squere": MatrixAxes(1)})
    with pytest.raises(UserError, match=r"conv.kernel has .* leaves none for outputs"):
        specs_of(params, KERNELS, axes | {"conv.kernel": MatrixAxes(3, stacked=1)})
    some = dataclasses.replace(KERNELS, targets=("conv",))
    assert find_kind("lora").specs(specs_of(params, some), some).keys() == {
        "conv.kernel"
    }


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"dropout": 0.1}, "dropout is 0.1, .* inputs .*: leave it at 0.0"),
        ({"full": ("norms",)}, r"full is \('norms',\), and a lifted .*: leave it at"),
        ({"init_from": "x"}, "init_from is 'x', and a lifted .*: leave it at ''"),
    ],
)
def test_what_merged_weights_cannot_do_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        lift(lambda params: params, dataclasses.replace(KERNELS, **changes))
