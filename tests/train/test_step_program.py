"""The text of a step's program shows what it holds and what it never forms."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import TINY, in_soak
from step_definitions import ONE, make_definition

from research.config.run_config import Config, MeshConfig, ModelConfig, OptimConfig
from research.models.attention_sharding import make_attend
from research.parallel import mesh as meshes
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train.step import optimizers, train_step
from research.weights import trainable

SPLIT = (1, 2, 4)  # data, fsdp, tensor


@pytest.fixture(scope="session")
def compiled_text(five_steps):
    """`compiled_text(kind, sizes)`: the compiled program of one device."""
    return functools.cache(
        lambda kind, sizes: five_steps(kind, sizes).lowered.compile().as_text()
    )


def gathered(text):
    """Results of all collectives that make an array whole again, by their sizes."""
    found = re.findall(r"= (?:\()?\w+\[([\d,]+)\].*? all-(?:gather|to-all)\(", text)
    return [tuple(map(int, sizes.split(","))) for sizes in found]


def shapes_of(model, **parts):
    """Shapes of one layer's matrices and of the tables, with some axes divided."""
    return {
        tuple(
            size // parts.get(name, 1)
            for name, size in zip(spec.axes, spec.shape, strict=True)
            if name != "layers"
        )
        for spec in model.specs.values()
        if spec.n_in
    }


@pytest.mark.parametrize("kind", ["lora", in_soak("full")])
def test_fsdp_gathers_matrices_and_a_tensor_axis_no_more_of_them(
    model, compiled_text, kind
):
    """Each device multiplies by its own part; activations are what travels."""
    made = {*gathered(compiled_text(kind, SPLIT))}
    # The table is looked up where it lies.
    tensor = dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), 4)
    assert made >= shapes_of(model, **tensor) - {(TINY.vocab // 4, TINY.embed)}
    assert not made & (shapes_of(model) | shapes_of(model, embed=2))


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fsdp_alone_gathers_each_matrix_and_a_tensor_axis_alone_none(
    model, compiled_text, kind
):
    sizes = {math.prod(shape) for shape in shapes_of(model)}
    made = gathered(compiled_text(kind, (2, 1, 4)))
    assert not sizes & {math.prod(shape) for shape in made}
    made = gathered(compiled_text(kind, (1, 8, 1)))
    assert sizes <= {math.prod(shape) for shape in made}


@pytest.mark.parametrize("kind", ["lora", in_soak("full")])
def test_a_context_axis_gathers_keys_values_and_segments_alone(model, batch, kind):
    lowered = lower_step(model, batch, kind, (1, 1, 1, 1, 8), "float32")
    made = gathered(lowered.compile().as_text())
    rows, length = batch.tokens.shape
    keys = rows * length * TINY.kv_heads * TINY.head_dim
    assert {math.prod(shape) for shape in made} == {keys, rows * length}


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("lora", SPLIT),
        in_soak("full", SPLIT),
        in_soak("lora", (1, 8, 1)),
        in_soak("full", (1, 8, 1)),
    ],
    ids=str,
)
def test_no_stack_of_matrices_is_ever_gathered_whole(model, compiled_text, kind, sizes):
    """In the compiled program of one device: a layer's matrix at a time, no more."""
    text = compiled_text(kind, sizes)
    seen = set(re.findall(r"[a-z]+\d+\[([\d,]+)\]", text))
    stacks = [spec for spec in model.specs.values() if spec.stacked and spec.n_in]
    assert len(stacks) == 7
    _, fsdp, tensor = sizes
    parts = {"embed": fsdp} | dict.fromkeys(("heads", "kv_heads", "mlp"), tensor)
    for spec in stacks:
        axes = dict(zip(spec.axes, spec.shape, strict=True))
        part = {name: size // parts.get(name, 1) for name, size in axes.items()}
        # This test can see such arrays: a device's part of the stack is there.
        assert ",".join(map(str, part.values())) in seen
        for name in parts.keys() & axes.keys():
            gathered = part | {name: axes[name]}
            assert gathered == part or ",".join(map(str, gathered.values())) not in seen
        assert ",".join(map(str, spec.shape)) not in seen


def lower_step(model, batch, kind, sizes, dtype):
    """The program of a step as it goes to the compiler."""
    definition, _ = make_definition(model, kind, sizes, dtype)
    arguments = (
        train_step.abstract_state(definition),
        {
            path: jax.ShapeDtypeStruct(spec.shape, definition.trainable.frozen_dtype)
            for path, spec in definition.trainable.frozen_specs.items()
        },
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch),
    )
    return train_step.jit_train_step(definition).lower(*arguments)


def test_bfloat16_compute_keeps_float32_adapters_and_moments(model, batch):
    lowered = lower_step(model, batch, "lora", ONE, "bfloat16")
    text, (state, metrics) = lowered.as_text(), lowered.out_info
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert metrics["means"]["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    # The factors of a product are bfloat16; some sums are float32.
    factors = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, .*x(\w+)>\) ->", text)
    assert len(factors) > 50 and set(factors) == {("bf16", "bf16")}


def in_bfloat16(model, name):
    """Full training in bfloat16 by that optimizer, and its abstract state."""
    config = Config(
        trainable="full",
        model=ModelConfig(param_dtype="bfloat16"),
        optim=OptimConfig(name=name),
    )
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    made = trainable.make(config.trainable, config.model, config.lora, model.specs)
    definition = train_step.StepDefinition(
        model=model.with_options(attend=make_attend(mesh, "xla", 7)),
        trainable=made,
        optimizer=optimizers.make_optimizer(config.optim, 10, made.specs),
        mesh=mesh,
        objective=CrossEntropy(groups=4, chunk=5, shards=meshes.shards(mesh)),
    )
    state = train_step.abstract_state(definition)
    asked = jnp.dtype("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {asked}
    moments = {str(leaf.dtype) for leaf in jax.tree.leaves(state.opt_state)}
    assert moments == {"float32", "int32"}
    return definition, state


def assert_same_kinds(before, after):
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_moments_stay_float32(model, name):
    definition, state = in_bfloat16(model, name)

    def update(gradients, state):
        return definition.optimizer.update(gradients, state.opt_state, state.params)

    gradients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), state.params
    )
    updates, opt_state = jax.eval_shape(update, gradients, state)
    assert_same_kinds(opt_state, state.opt_state)
    assert_same_kinds(updates, gradients)


@pytest.mark.parametrize(
    "name", ["adamw", *map(in_soak, ("adafactor", "lion", "muon"))]
)
def test_a_step_keeps_the_dtypes_and_adds_up_gradients_in_float32(model, batch, name):
    definition, state = in_bfloat16(model, name)
    several = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), batch
    )
    train = jax.jit(functools.partial(train_step.train_step, definition)).trace(
        state, {}, several
    )
    assert_same_kinds(state, train.out_info[0])
    # The first loop is that over microbatches; Muon has one of its own after it.
    sums = next(eqn for eqn in train.jaxpr.eqns if eqn.primitive.name == "scan")
    assert {str(var.aval.dtype) for var in sums.outvars} == {"float32"}


def product_shapes(text):
    found = re.findall(r"dot_general.*-> tensor<((?:\d+x)+)[a-z]", text)
    return [tuple(map(int, dims.split("x")[:-1])) for dims in found]


@pytest.mark.parametrize("sizes", [SPLIT, in_soak(ONE)], ids=str)
def test_lora_forms_no_gradient_of_a_full_matrix(model, five_steps, sizes):
    matrices = {
        tuple(sorted(spec.shape[spec.stacked :]))
        for spec in model.specs.values()
        if spec.n_in
    }
    formed = {}
    for kind in ("lora", "full"):
        text = five_steps(kind, sizes).lowered.as_text()
        shapes = {tuple(sorted(shape)) for shape in product_shapes(text)}
        formed[kind] = shapes & matrices
    assert formed["lora"] == set()
    # The table is looked up, which is no product.
    assert len(formed["full"]) >= 4, "this test can see such products"


@pytest.mark.parametrize("sizes", [SPLIT, in_soak((2, 2, 2))], ids=str)
def test_logits_of_a_batch_never_exist(five_steps, sizes):
    text = five_steps("full", sizes).lowered.as_text()
    dims = {
        tuple(map(int, found.split("x")[:-1]))
        for found in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    }
    heads = {(TINY.embed, TINY.vocab)}
    rows = [math.prod(d[:-1]) for d in dims if d[-1] == TINY.vocab and d not in heads]
    shards = sizes[0] * sizes[1]
    assert max(rows) == 5 * shards, "loss_chunk positions in each shard of rows"


@pytest.mark.parametrize("sizes", [SPLIT, in_soak((2, 2, 2))], ids=str)
def test_activations_are_pinned_on_cpu_too(five_steps, sizes):
    text = five_steps("lora", sizes).lowered.as_text()
    pins = re.findall(r"sharding_constraint.*tensor<8x24x40x", text)
    assert len(pins) >= 2, "the embedding's output and every layer's"
