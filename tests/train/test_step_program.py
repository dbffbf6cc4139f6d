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


@pytest.fixture(scope="module")
def compiled_text(model, batch):
    """`compiled_text(kind, sizes)`: the program of one device."""

    @functools.cache
    def text(kind, sizes):
        return lower_step(model, batch, kind, sizes, "float32").compile().as_text()

    return text


def gathered(text):
    """Results of all collectives that make an array whole again, by their sizes."""
    found = re.findall(r"= (?:\()?\w+\[([\d,]+)\].*? all-(?:gather|to-all)\(", text)
    return [tuple(map(int, sizes.split(","))) for sizes in found]


@pytest.mark.parametrize("kind", ["lora", in_soak("full")])
def test_a_tensor_axis_gathers_no_parameter(model, compiled_text, kind):
    """Each device multiplies by its own part; activations are what travels."""
    made = gathered(compiled_text(kind, (2, 1, 4)))
    shapes = {spec.shape[spec.stacked :] for spec in model.specs.values() if spec.n_in}
    sizes = {math.prod(shape) for shape in shapes}
    assert not [shape for shape in made if math.prod(shape) in sizes]
    # This test can see them: with fsdp every matrix is gathered.
    made = gathered(compiled_text(kind, (1, 8, 1)))
    assert {math.prod(shape) for shape in made} >= sizes


@pytest.mark.parametrize("kind", ["lora", in_soak("full")])
def test_a_context_axis_gathers_keys_values_and_segments_alone(
    batch, compiled_text, kind
):
    made = gathered(compiled_text(kind, (1, 1, 1, 1, 8)))
    rows, length = batch.tokens.shape
    keys = rows * length * TINY.kv_heads * TINY.head_dim
    assert {math.prod(shape) for shape in made} == {keys, rows * length}


@pytest.mark.parametrize("kind", ["lora", in_soak("full")])
def test_no_stack_of_matrices_is_ever_gathered_whole(model, compiled_text, kind):
    """In the compiled program of one device: a layer's matrix at a time, no more."""
    text = compiled_text(kind, (1, 8, 1))
    seen = set(re.findall(r"[a-z]+\d+\[([\d,]+)\]", text))
    stacks = [spec for spec in model.specs.values() if spec.stacked and spec.n_in]
    assert len(stacks) == 7
    for spec in stacks:
        assert ",".join(map(str, spec.shape)) not in seen
        # This test can see such arrays: a device's part of the stack is there.
        axes = zip(spec.shape, spec.axes, strict=True)
        part = [size // 8 if name == "embed" else size for size, name in axes]
        assert ",".join(map(str, part)) in seen


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


def lowered_step(model, batch, kind, sizes, dtype):
    """Its text, and its abstract results."""
    lowered = lower_step(model, batch, kind, sizes, dtype)
    return lowered.as_text(), lowered.out_info


def test_bfloat16_compute_keeps_float32_adapters_and_moments(model, batch):
    text, (state, metrics) = lowered_step(model, batch, "lora", ONE, "bfloat16")
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert metrics["means"]["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    # The factors of a product are bfloat16; some sums are float32.
    factors = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, .*x(\w+)>\) ->", text)
    assert len(factors) > 50 and set(factors) == {("bf16", "bf16")}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_parameters_and_moments_keep_the_dtype_that_is_asked_for(model, batch, name):
    """Holds for every optimizer; gradients are still added up in float32."""
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
    several = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), batch
    )
    train = jax.jit(functools.partial(train_step.train_step, definition)).trace(
        state, {}, several
    )
    after, _ = train.out_info
    for old, new in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    # The first loop is that over microbatches; Muon has one of its own after it.
    sums = next(eqn for eqn in train.jaxpr.eqns if eqn.primitive.name == "scan")
    assert {str(var.aval.dtype) for var in sums.outvars} == {"float32"}


def product_shapes(text):
    found = re.findall(r"dot_general.*-> tensor<((?:\d+x)+)[a-z]", text)
    return [tuple(map(int, dims.split("x")[:-1])) for dims in found]


def test_lora_forms_no_gradient_of_a_full_matrix(model, batch):
    matrices = {
        tuple(sorted(spec.shape[spec.stacked :]))
        for spec in model.specs.values()
        if spec.n_in
    }
    formed = {}
    for kind in ("lora", "full"):
        text, _ = lowered_step(model, batch, kind, ONE, "float32")
        shapes = {tuple(sorted(shape)) for shape in product_shapes(text)}
        formed[kind] = shapes & matrices
    assert formed["lora"] == set()
    # The table is looked up, which is no product.
    assert len(formed["full"]) >= 4, "this test can see such products"


def test_logits_of_a_batch_never_exist(model, batch):
    text, _ = lowered_step(model, batch, "full", (2, 2, 2), "float32")
    dims = {
        tuple(map(int, found.split("x")[:-1]))
        for found in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    }
    heads = {(TINY.embed, TINY.vocab)}
    rows = [math.prod(d[:-1]) for d in dims if d[-1] == TINY.vocab and d not in heads]
    assert max(rows) == 5 * 4, "loss_chunk positions in each of four shards"


def test_activations_are_pinned_on_cpu_too(model, batch):
    text, _ = lowered_step(model, batch, "lora", (2, 2, 2), "float32")
    pins = re.findall(r"sharding_constraint.*tensor<8x24x40x", text)
    assert len(pins) >= 2, "the embedding's output and every layer's"
