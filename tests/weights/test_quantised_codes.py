"""A matrix in codes stands for one matrix in every use, and lets gradients through."""

import dataclasses
import functools
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, close, in_soak, mesh_sizes, random_params
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from research.config.run_config import LoRAConfig, ModelConfig
from research.core.errors import UserError
from research.formats.load_parameters import load_frozen_param
from research.models.families.stored_tensor import StoredTensor
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.weights import parameter_paths, trainable
from research.weights.contraction import (
    contract,
    contract_groups,
    expand,
    lookup,
    materialize,
    transpose,
)
from research.weights.parameter_spec import Spec
from research.weights.quantized.block_codes import LEVELS
from research.weights.quantized.int8_weights import Int8Matrix
from research.weights.representations.frozen_base_format import find_format
from research.weights.representations.grouped_product import Groups
from research.weights.representations.leaf import Leaf
from research.weights.representations.transposed import Transposed

SHAPES = {
    "plain": Spec((128, 6), ("embed", "mlp")),
    "short": Spec((40, 56), ("embed", "mlp")),
    "in": Spec((4, 96, 5), ("heads", "head_dim", "embed"), n_in=2),
    "stacked": Spec(
        (3, 128, 4, 10), ("layers", "embed", "heads", "head_dim"), stacked=1
    ),
    "experts": Spec(
        (2, 3, 64, 10), ("layers", "expert", "expert_embed", "expert_mlp"), stacked=2
    ),
    "table": Spec((300, 128), ("vocab", "embed")),
}
UP = "layers.mlp.up.kernel"
FORMATS = ("int8", "int4", "nf4")
GOLDEN = Path(__file__).parents[1] / "golden"


def drawn(shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


@functools.partial(jax.jit, static_argnums=(0, 1))
def stored(name, spec, weight):
    return find_format(name).store(weight, spec)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("int4", "plain"),
        ("nf4_16", "plain"),
        *(("nf4", shape) for shape in SHAPES if shape != "table"),
    ],
)
def test_each_weight_is_within_half_a_gap_of_its_block(name, shape):
    spec = SHAPES[shape]
    # Outputs of different size, and one of zeros.
    sizes = np.linspace(0.1, 3, spec.shape[-1], dtype=np.float32)
    weight = np.array(drawn(spec.shape)) * sizes
    weight[..., 0] = 0
    made = stored(name, spec, weight)
    described = find_format(name).specs(spec)
    assert jax.tree.map(lambda x, y: x.shape == y.shape, made, described)
    for array, like in zip(*map(jax.tree.leaves, (made, described)), strict=True):
        assert (array.shape, array.dtype) == (like.shape, like.dtype)
    axis = spec.stacked + spec.n_in - 1
    count = made.scales.shape[axis]
    size = spec.shape[axis] // count
    sizes = {128: 64, 64: 64, 96: 48, 40: 40} if name != "nf4_16" else {128: 16}
    assert size == sizes[spec.shape[axis]]
    blocks = weight.reshape(*spec.shape[:axis], count, size, *spec.shape[axis + 1 :])
    largest = np.abs(blocks).max(axis + 1)
    # A scale is within half a step, and its levels are that much too near or far.
    of_matrix = tuple(range(spec.stacked, largest.ndim))
    spread = np.ptp(largest, of_matrix, keepdims=True) / 255 / 2
    gap = np.diff(LEVELS[made.levels]).max() / 2
    bound = np.repeat(largest * gap + 1.1 * spread, size, axis)
    assert (np.abs(materialize(made) - weight) <= bound + 1e-7).all()
    # The mean error of a normal block is that of the codes, not of a blunder.
    error = np.sqrt(np.mean((materialize(made) - weight) ** 2) / np.mean(weight**2))
    assert error < {"nf4": 0.11, "nf4_16": 0.08, "int4": 0.13}[name]


@pytest.mark.parametrize(
    "name, shape",
    [
        ("nf4", "short"),
        ("nf4", "in"),
        ("int8", "table"),
        ("int4", "plain"),
        ("int4_32", "in"),
        ("int8", "in"),
    ],
)
def test_products_rows_and_gradients_are_those_of_the_decoded_matrix(name, shape):
    spec = SHAPES[shape]
    made = stored(name, spec, drawn(spec.shape))
    whole = materialize(made)
    assert made.shape == spec.shape == whole.shape
    x = drawn((2, 3, *spec.in_shape), 1)

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(w, x, n_in):
        return jax.grad(lambda x: jnp.sum(jnp.sin(contract(x, w, n_in))))(x)

    close(contract(x, made, spec.n_in), np.tensordot(x, whole, spec.n_in))
    close(gradient(made, x, spec.n_in), gradient(whole, x, spec.n_in))
    narrow = contract(x.astype(jnp.bfloat16), made, spec.n_in)
    assert narrow.dtype == jnp.bfloat16
    # Weights are rounded once, to the dtype of the inputs.
    exact = contract(x.astype(jnp.bfloat16), whole.astype(jnp.bfloat16), spec.n_in)
    np.testing.assert_array_equal(narrow, exact)
    if len(spec.shape) == 2:
        back, ids = transpose(made), jnp.array([[0, 39], [7, 7]])
        assert back.shape == whole.T.shape
        close(materialize(back), whole.T)
        y = drawn((3, spec.shape[1]), 2)
        close(contract(y, back), y @ whole.T)
        close(gradient(back, y, 1), gradient(whole.T, y, 1))
        for one, array in ((made, whole), (back, whole.T)):
            some = ids % array.shape[0]
            close(lookup(one, some, jnp.float32), array[some])


@pytest.mark.parametrize("name", ["nf4", in_soak("int8")])
def test_rows_of_experts_meet_their_own_matrix(name):
    spec = SHAPES["experts"].of_stack(1)
    made = stored(name, spec, drawn(spec.shape))
    whole = materialize(made)
    owners = jnp.array([0, 0, 1, 2, 2, 3])
    groups = Groups(jnp.array([2, 1, 2]), owners, jnp.arange(6), block=4)
    x = drawn((6, 64), 1)
    expected = jnp.stack([x[i] @ whole[e] for i, e in enumerate(owners[:5])])
    found = contract_groups(x, made, groups)
    close(found[:5], expected)
    assert not found[5].any()

    def loss(w):
        return jax.grad(lambda x: jnp.sum(jnp.sin(contract_groups(x, w, groups))))(x)

    close(loss(made), loss(whole))


def test_only_inputs_have_a_gradient_and_no_layer_is_kept_as_an_array():
    """The way back of a scan makes each layer's array again, from its codes."""
    layers, size = 16, 256
    spec = Spec((layers, size, size), ("layers", "embed", "mlp"), stacked=1)
    x = drawn((8, size), 1)

    def loss(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (contract(x, w), None), x, w)[0])

    weight = drawn(spec.shape) * size**-0.5
    for name in ("int8", "nf4"):
        made = stored(name, spec, weight)
        step = jax.jit(jax.grad(loss)).lower(x, made).compile()
        temporary = step.memory_analysis().temp_size_in_bytes
        assert temporary < weight.nbytes / 3, (name, temporary)
        close(step(x, made), jax.grad(loss)(x, materialize(made)), 1e-4)
        floats = [leaf for leaf in jax.tree.leaves(made) if leaf.dtype == jnp.float32]
        kept = {id(leaf) for leaf in floats}

        def of_floats(floats, made=made, kept=kept):
            moved = iter(floats)
            leaves, structure = jax.tree.flatten(made)
            full = [next(moved) if id(leaf) in kept else leaf for leaf in leaves]
            return loss(x, structure.unflatten(full))

        assert not any(jnp.any(g) for g in jax.grad(of_floats)(floats))


@pytest.mark.parametrize("name", ["nf4", in_soak("int8")])
def test_a_pack_of_runs_shares_one_matrix(name):
    spec = SHAPES["plain"]
    made = stored(name, spec, drawn(spec.shape))
    x = drawn((3, 5, 128), 1)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(contract(x, made))))(x)

    close(jax.vmap(gradient)(x), jnp.stack([gradient(one) for one in x]))


@pytest.mark.parametrize(
    "name", ["nf4", *map(in_soak, ("int8", "int4", "int4_32", "nf4_16"))]
)
def test_codes_are_the_same_on_every_mesh_and_so_is_the_model(name):
    model, form = Model(TINY), find_format(name)
    params = random_params(model.specs)
    made = {p: stored(name, spec, params[p]) for p, spec in model.specs.items()}
    specs = {path: form.specs(spec) for path, spec in model.specs.items()}
    assert isinstance(made["head.kernel"], Leaf)
    assert isinstance(made["embedding.table"], Leaf)
    mesh = meshes.make_mesh(mesh_sizes(fsdp=2, tensor=4))
    where = meshes.shardings(specs, mesh)
    plain = meshes.shardings(model.specs, mesh)

    @jax.jit
    def logits(params):
        tokens = np.random.default_rng(0).integers(0, TINY.vocab, (8, 6), np.int32)
        at = jnp.broadcast_to(jnp.arange(6), tokens.shape)
        hidden = model.hidden(params, tokens, at, jnp.ones_like(tokens))
        return model.logits(params, hidden)

    placed = {
        p: jax.jit(form.store, static_argnums=1, out_shardings=where[p])(
            jax.device_put(params[p], plain[p]), spec
        )
        for p, spec in model.specs.items()
    }
    jax.tree.map(np.testing.assert_array_equal, placed, made)
    expected = logits({path: materialize(leaf) for path, leaf in made.items()})
    close(logits(made), expected, 1e-4)
    close(logits(placed), expected, 1e-4)
    codes = jax.tree.leaves(placed["layers.mlp.up.kernel"])[0]
    assert len({shard.index for shard in codes.addressable_shards}) == 8


def test_scales_that_a_mesh_does_not_divide_stay_whole():
    spec = Spec((192, 8), ("embed", "mlp"))
    form = find_format("nf4").specs(spec)  # Three blocks along the inputs.
    mesh = meshes.make_mesh(mesh_sizes(fsdp=2, tensor=4))
    where = meshes.shardings({"w": form}, mesh)["w"]
    assert where.codes.spec == PartitionSpec("fsdp", "tensor")
    assert where.scales.spec == PartitionSpec(None, "tensor")
    with pytest.raises(UserError, match="does not divide"):
        odd = dataclasses.replace(spec, shape=(190, 8))
        meshes.shardings({"w": find_format("nf4").specs(odd)}, mesh)


def test_steps_above_an_offset_are_those_of_a_file_that_has_them():
    """Blocks of Q4_1 have codes 0 and 15, so their steps are found again."""
    spec, rng = SHAPES["stacked"], np.random.default_rng(0)
    blocks = 3, 4, 1, 40
    codes = rng.integers(0, 16, (3, 4, 32, 40)).astype(np.float32)
    codes[:, :, 5], codes[:, :, 9] = 0, 15
    scales, offsets = (np.float32(rng.uniform(1, 3, blocks)) for _ in range(2))
    weight = (codes * scales - 9 * offsets).reshape(spec.shape)
    made = stored("int4_32", spec, weight)
    packed = np.asarray(made.codes).reshape(3, 4, 16, 40)
    np.testing.assert_array_equal(packed & 15, codes[:, :, 0::2])
    np.testing.assert_array_equal(packed >> 4, codes[:, :, 1::2])
    # Offsets lie between -27 and -9, and are in 255 steps, as scales are.
    error = np.abs(materialize(made) - weight).max()
    assert error < (18 / 2 + 15 * 2 / 2) / 255 * 1.01
    drawn_error = {
        name: np.linalg.norm(materialize(stored(name, spec, x)) - x)
        for x in [drawn(spec.shape)]
        for name in ("int4_32", "nf4_16", "nf4")
    }
    assert drawn_error["int4_32"] < 1.1 * drawn_error["nf4_16"] < drawn_error["nf4"]


def test_nf4_loses_no_more_than_that_of_bitsandbytes():
    """Which has blocks of 64 inputs, and scales in codes of 8 bits, too."""
    tensors = load_file(GOLDEN / "packed/bitsandbytes_nf4_nested.safetensors")
    weight, theirs = (np.float32(tensors[x]).T for x in ("weight", "read"))
    spec = Spec(weight.shape, ("embed", "mlp"))
    ours = materialize(stored("nf4", spec, jnp.asarray(weight)))
    lost = np.linalg.norm(ours - weight), np.linalg.norm(theirs - weight)
    assert 0.09 < lost[1] / np.linalg.norm(weight) < 0.1
    assert lost[0] < 1.01 * lost[1]


def test_small_and_odd_parameters():
    table = SHAPES["table"]
    for name in FORMATS:
        form = find_format(name)
        assert isinstance(form.specs(table), Int8Matrix)
        for axes in (("embed", "choices"), ("positions", "embed")):
            spec = Spec((64, 8), axes)
            assert form.specs(spec) == spec
            weight = drawn(spec.shape)
            assert form.store(weight, spec) is weight
    odd = Spec((9, 8), ("embed", "mlp"))
    assert find_format("int8").specs(odd).shape == odd.shape
    with pytest.raises(
        UserError, match=r"int4 packs two .* \[9, 8\] has 9: use .*int8"
    ):
        find_format("int4").specs(odd)


def test_a_loop_may_hold_the_array_once():
    spec = SHAPES["table"]
    made = stored("nf4", spec, drawn(spec.shape))
    y = drawn((3, 128), 2)
    held = expand({"head": transpose(made), "norm": y}, jnp.dtype(jnp.float32))
    assert isinstance(held["head"], Transposed) and held["norm"] is y
    close(contract(y, held["head"]), contract(y, transpose(made)))


@dataclasses.dataclass
class Drawn:
    """A file of one matrix a layer, each made when it is read."""

    shape: tuple[int, ...]

    def layout(self, family):
        return (StoredTensor("layers.{}.up", (UP,)),)

    def read(self, name):
        return np.full(self.shape, float(name.split(".")[1]), np.float32)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_host_never_holds_a_stack_of_layers_as_arrays(name):
    layers, size = 48, 256
    model = Model(TINY)
    spec = Spec((layers, size, size), ("layers", "embed", "mlp"), stacked=1)
    split = trainable.make(
        "lora",
        ModelConfig(quantize=name),
        LoRAConfig(targets=("up",)),
        model.specs | {UP: spec},
    )
    mesh = meshes.make_mesh(mesh_sizes(), jax.devices()[:1])
    arguments = Drawn((size, size)), None, UP, {UP: spec}, split, mesh
    load_frozen_param(*arguments)  # Compiles.
    tracemalloc.start()
    made = load_frozen_param(*arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = size * size * 4  # The dtype of the run has half of it.
    assert peak < parameter_paths.nbytes(made) + 8 * one < layers * one / 2
    close(materialize(made)[:, 0, 0], np.arange(layers), 1e-2)
