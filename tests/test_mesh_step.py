"""A step means the same on every mesh, in every split of the batch.

Compiling a step takes seconds, so each kind of run is made once and shared.
"""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, close, in_soak, mesh_sizes, random_adapters
from jax.sharding import PartitionSpec as P

from research import mesh as meshes
from research import optim, step, trainable
from research.batch import Batch
from research.config import (
    CheckpointConfig,
    Config,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
)
from research.errors import UserError
from research.matrix import Spec, contract
from research.models.transformer import Model
from research.saving.manager import Checkpointer
from research.sharded_attention import make_attend

ONE = (1, 1, 1)
# A large eps: Adam turns rounding in a gradient near zero into a full-size update.
OPTIM = OptimConfig(learning_rate=1e-2, eps=1e-2, clip_norm=1.0)
LORA = LoRAConfig(rank=4, alpha=8.0, targets=(".",))


def make_job(model, kind, sizes, dtype="float32"):
    """A job, and how often its forward pass was traced so far."""
    config = Config(
        trainable=kind, model=ModelConfig(dtype=dtype), lora=LORA, optim=OPTIM
    )
    mesh = meshes.make_mesh(mesh_sizes(*sizes), jax.devices()[: math.prod(sizes)])
    made = trainable.make(config, model.specs)
    traced = []

    def forward(*arguments):
        traced.append(1)
        return made.forward(*arguments)

    job = step.Job(
        model=model.with_options(
            constrain=meshes.constrain(mesh),
            attend=make_attend(mesh, "xla", 7),
            dtype=jnp.dtype(dtype),
        ),
        trainable=dataclasses.replace(made, forward=forward),
        optimizer=optim.make_optimizer(OPTIM, 10, made.specs),
        mesh=mesh,
        loss_chunk=5,
        groups=4,
    )
    return job, traced


def place(values, specs, mesh):
    return jax.device_put(values, meshes.shardings(specs, mesh))


@pytest.fixture(scope="module")
def run(model, params, batch):
    """`run(kind, sizes, microbatches)`: five steps and all one can ask about them."""

    @functools.cache
    def five_steps(kind, sizes, microbatches, offload):
        job, traced = make_job(model, kind, sizes)
        job = dataclasses.replace(job, offload=offload)
        lora = kind == "lora"
        frozen = place(params, model.specs, job.mesh) if lora else {}
        start = random_adapters(job.trainable.specs) if lora else params
        first = step.jit_init(job)(place(start, job.trainable.specs, job.mesh))
        state, train = first, step.jit_train_step(job)
        on_mesh = meshes.to_global(batch, job.mesh, microbatches)
        metrics, traces = [], []
        for _ in range(5):
            state, found = train(state, frozen, on_mesh)
            metrics.append(jax.tree.map(np.asarray, found))
            traces.append(len(traced))
        return types.SimpleNamespace(
            job=job, frozen=frozen, first=first, state=state, metrics=metrics,
            traces=traces, compiled=train._cache_size(),
        )  # fmt: skip

    return lambda kind, sizes=ONE, microbatches=1, offload=False: five_steps(
        kind, sizes, microbatches, offload
    )


def assert_same_training(found, expected):
    close(found.metrics, expected.metrics)
    close(found.state, expected.state)


# data, fsdp, tensor, replica, context; and microbatches. The rest is in the soak.
MESHES = [
    ("full", (1, 2, 4), 1),
    ("full", (1, 1, 2, 1, 4), 2),
    ("lora", (1, 2, 4), 1),
]
MORE_MESHES = [
    ("full", (1, 2, 1, 2, 2), 1),
    ("full", (1, 8, 1), 1),
    ("full", (2, 2, 2), 2),
    ("lora", (2, 2, 2), 2),
]


@pytest.mark.parametrize(
    "kind, sizes, microbatches",
    [*MESHES, *(in_soak(*case) for case in MORE_MESHES)],
    ids=str,
)
def test_every_mesh_trains_as_one_device(run, kind, sizes, microbatches):
    assert_same_training(run(kind, sizes, microbatches), run(kind))


@pytest.mark.soak
def test_splitting_the_batch_changes_nothing(run):
    """The rows' weights are uneven: a mean of means would differ."""
    assert_same_training(run("lora", ONE, 4), run("lora"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_moves_what_it_should(run, params, kind):
    found = run(kind)
    losses = [metrics["loss"] for metrics in found.metrics]
    assert losses[2] < losses[1] < losses[0]
    assert int(found.state.step) == 5
    start = params if kind == "full" else random_adapters(found.job.trainable.specs)
    for before, after in zip(
        jax.tree.leaves(start), jax.tree.leaves(found.state.params), strict=True
    ):
        assert np.abs(before - after).max() > 1e-4


def plain_token_losses(model, params, batch):
    """From logits of everything, without any of the loss module."""
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.segments)
    logits = np.array(contract(hidden, model.head(params)), np.float64)
    picked = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - picked


def test_metrics_are_what_their_names_say(run, model, params, batch):
    found = run("full").metrics[0]
    assert found["weight"] == batch.weights.sum()
    assert found["tokens"] == (batch.segments != 0).sum()
    plain = (plain_token_losses(model, params, batch) * batch.weights).sum()
    np.testing.assert_allclose(found["loss"], plain / batch.weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["group_loss"].sum(), plain, rtol=1e-5)
    for group in range(4):
        inside = batch.weights[batch.groups == group].sum()
        assert found["group_weight"][group] == inside


def test_eval_sums_each_group_once(model, params, batch):
    shares = np.random.default_rng(0).uniform(0.5, 1.0, batch.weights.shape)
    batch = dataclasses.replace(batch, weights=np.float32(batch.weights * shares))
    job, _ = make_job(model, "full", (2, 2, 2))
    placed = place(params, model.specs, job.mesh)
    evaluate = step.jit_eval_step(job)
    found = evaluate(placed, {}, meshes.to_global(batch, job.mesh))
    plain = plain_token_losses(model, params, batch) * batch.weights
    for group in range(4):
        inside = batch.groups == group
        loss, weight = plain[inside].sum(), batch.weights[inside].sum()
        np.testing.assert_allclose(found["loss"][group], loss, rtol=1e-5)
        np.testing.assert_allclose(found["weight"][group], weight, rtol=1e-5)
        assert (weight > 0) == (group < 3)


@pytest.mark.parametrize("field", ["tokens", "targets", "segments", "weights"])
def test_the_hash_of_a_batch_sees_each_value(field):
    """At every place: a product modulo 2**32 loses what ends in zeros."""
    shape = (1, 2, 520)
    ids, ones = np.ones(shape, np.int32), np.ones(shape, np.float32)
    batch = Batch(ids, ids, ones, ids, ids, ids)
    hash_batch = jax.jit(step.hash_batch)
    seen = {int(hash_batch(batch))}
    places = [*range(0, 1040, 64), 512, 1039]
    for place in dict.fromkeys(places):
        values = np.array(getattr(batch, field))
        values.flat[place] = 0
        seen.add(int(hash_batch(dataclasses.replace(batch, **{field: values}))))
    assert len(seen) == 1 + len(dict.fromkeys(places))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_is_traced_and_compiled_once(run, kind):
    found = run(kind, (1, 2, 4))
    assert found.traces[0] == found.traces[2] > 0
    assert found.compiled == 1


def test_state_is_donated_and_frozen_is_kept(run, params):
    found = run("lora", (1, 2, 4))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(found.first))
    assert found.frozen.keys() == params.keys()
    for path, leaf in found.frozen.items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


def test_a_lora_state_holds_adapters_and_their_moments_only(run):
    found = run("lora")
    adapters = sum(x.size for x in jax.tree.leaves(found.state.params))
    whole = sum(x.size for x in jax.tree.leaves(found.state))
    counters = sum(x.size == 1 for x in jax.tree.leaves(found.state))
    assert whole == 3 * adapters + counters


def test_adapters_lie_as_their_base_kernels(model):
    job, _ = make_job(model, "lora", (2, 2, 2))
    found = {
        f"{path.split('.')[-2]}.{name}": sharding.spec
        for path, factors in step.state_shardings(job).params.items()
        for name, sharding in factors.items()
    }
    assert found["query.a"] == P(None, "fsdp", None)
    assert found["query.b"] == P(None, None, "tensor", None)
    assert found["output.a"] == P(None, "tensor", None, None)
    assert found["output.b"] == P(None, None, "fsdp")
    assert found["down.a"] == P(None, "tensor", None)
    assert found["down.b"] == P(None, None, "fsdp")
    assert found["embedding.a"] == P("tensor", None)
    assert found["head.b"] == P(None, "tensor")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_state_stays_where_it_was_put(run, kind):
    """Moments lie as their parameters, before and after a step."""
    found = run(kind, (1, 2, 4))
    wanted = step.abstract_state(found.job)
    for leaf, abstract in zip(
        jax.tree.leaves(found.state), jax.tree.leaves(wanted), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    parts = {
        leaf.shape: leaf.sharding.shard_shape(leaf.shape)
        for leaf in jax.tree.leaves(found.state.params)
    }
    for leaf in jax.tree.leaves(found.state.opt_state):
        if leaf.ndim:
            assert leaf.sharding.shard_shape(leaf.shape) == parts[leaf.shape]


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


def test_fsdp_leaves_no_matrix_whole(run, model):
    eight = meshes.shardings(model.specs, meshes.make_mesh(mesh_sizes(1, 8, 1)))
    held = [(p, eight[p], spec.shape) for p, spec in model.specs.items()]
    frozen = run("lora", (1, 2, 4)).frozen
    held += [(path, leaf.sharding, leaf.shape) for path, leaf in frozen.items()]
    for path, sharding, shape in held:
        share = math.prod(sharding.shard_shape(shape)) / math.prod(shape)
        assert share == (1.0 if "norm" in path else 1 / 8), path


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_tensor_axis_leaves_no_matrix_whole(model, kind):
    """Nor the base under adapters, nor a moment; one factor of a pair stays whole."""
    job, _ = make_job(model, kind, (1, 1, 4))
    where = meshes.shardings(model.specs, job.mesh)
    for path, spec in model.specs.items():
        part = math.prod(where[path].shard_shape(spec.shape)) / math.prod(spec.shape)
        assert part == (1.0 if "norm" in path else 1 / 4), path
    state = step.abstract_state(job)
    matrices = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in matrices)
    assert held < (0.7 if kind == "lora" else 0.3) * sum(x.size for x in matrices)


def test_an_offloaded_optimizer_lies_on_the_host_and_trains_the_same(run):
    found, plain = run("full", (1, 2, 4), offload=True), run("full", (1, 2, 4))
    assert_same_training(found, plain)
    for leaf in jax.tree.leaves((found.first.opt_state, found.state.opt_state)):
        on_host = leaf.sharding.memory_kind == meshes.HOST_MEMORY
        assert on_host == (leaf.ndim > 0)
    params = jax.tree.leaves(found.state.params)
    assert meshes.HOST_MEMORY not in {leaf.sharding.memory_kind for leaf in params}


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_a_checkpoint_goes_to_either_memory(run, tmp_path, before, after):
    """Byte for byte, whichever memory it came from."""
    found = run("full", (1, 2, 4), offload=before)
    wanted = step.abstract_state(dataclasses.replace(found.job, offload=after))
    with Checkpointer(tmp_path, CheckpointConfig(), {}) as checkpointer:
        checkpointer.save(5, found.state, {}, None)
    with Checkpointer(tmp_path, CheckpointConfig(), {}) as checkpointer:
        restored = checkpointer.restore(wanted).state
    for old, new, abstract in zip(
        *map(jax.tree.leaves, (found.state, restored, wanted)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
        assert new.sharding.memory_kind == abstract.sharding.memory_kind


@pytest.mark.parametrize(
    "changes, sizes, said",
    [
        (
            {"heads": 6, "kv_heads": 2},
            (2, 1, 4),
            r"layers\.attention\.\w+\.kernel: axis '(kv_)?heads' of size [26] does not "
            r"divide over tensor=4; .*config\.mesh\.tensor.* 1, 2",
        ),
        (
            {"embed": 42},
            (1, 8, 1),
            r"embedding\.table: axis 'embed' of size 42 does not divide over fsdp=8; "
            r".*config\.mesh\.fsdp.* 1, 2, 3, 6, 7, 14, 21, 42",
        ),
    ],
    ids=["heads", "embed"],
)
def test_a_size_that_does_not_divide_names_path_axis_and_remedy(changes, sizes, said):
    specs = Model(dataclasses.replace(TINY, **changes)).specs
    with pytest.raises(UserError, match=said):
        meshes.shardings(specs, meshes.make_mesh(mesh_sizes(*sizes)))


def test_an_axis_without_a_rule_is_not_replicated_silently():
    with pytest.raises(ValueError, match=r"some\.path: axis 'colour' has no rule"):
        meshes.partition(("embed", "colour"), "some.path")


def test_two_axes_cannot_have_one_mesh_axis():
    with pytest.raises(ValueError, match=r"some\.path: .*'heads', 'mlp'.* twice"):
        meshes.partition(("heads", "mlp"), "some.path")
    with pytest.raises(ValueError, match="twice"):
        meshes.partition(("batch", "embed"))


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (2, 2, 1), (-2, 1, 1)]
)
def test_mesh_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match=f"data={sizes[0]}, fsdp={sizes[1]}"):
        meshes.make_mesh(mesh_sizes(*sizes))


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1), (-1, 3, 1), (1, 16, 1), (2, 2, 1), (1, 4, 4), (-1, 1, 5)]
)
def test_sizes_that_an_error_names_fit(sizes):
    with pytest.raises(UserError, match="try ") as raised:
        meshes.make_mesh(mesh_sizes(*sizes))
    said = re.findall(r"config\.mesh\.(\w+)=(\d+)", str(raised.value))
    assert said
    for axis, size in said:
        mended = dataclasses.replace(mesh_sizes(*sizes), **{axis: int(size)})
        assert meshes.make_mesh(mended).size == jax.device_count()


def test_the_rest_of_the_devices_is_found():
    assert meshes.make_mesh(mesh_sizes(-1, 2, 2)).shape == {
        "replica": 1, "data": 2, "fsdp": 2, "tensor": 2, "context": 1,
    }  # fmt: skip


def lower_step(model, batch, kind, sizes, dtype):
    """The program of a step as it goes to the compiler."""
    job, _ = make_job(model, kind, sizes, dtype)
    arguments = (
        step.abstract_state(job),
        {
            path: jax.ShapeDtypeStruct(spec.shape, job.trainable.frozen_dtype)
            for path, spec in job.trainable.frozen_specs.items()
        },
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch),
    )
    return step.jit_train_step(job).lower(*arguments)


def lowered_step(model, batch, kind, sizes, dtype):
    """Its text, and its abstract results."""
    lowered = lower_step(model, batch, kind, sizes, dtype)
    return lowered.as_text(), lowered.out_info


def test_bfloat16_compute_keeps_float32_adapters_and_moments(model, batch):
    text, (state, metrics) = lowered_step(model, batch, "lora", ONE, "bfloat16")
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    # What goes into a product is bfloat16; some sum up in float32.
    factors = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, .*x(\w+)>\) ->", text)
    assert len(factors) > 50 and set(factors) == {("bf16", "bf16")}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_parameters_and_moments_keep_the_dtype_that_is_asked_for(model, batch, name):
    """Of every optimizer; gradients are added up in float32 all the same."""
    config = Config(
        trainable="full",
        model=ModelConfig(param_dtype="bfloat16"),
        optim=OptimConfig(name=name),
    )
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    made = trainable.make(config, model.specs)
    job = step.Job(
        model=model.with_options(attend=make_attend(mesh, "xla", 7)),
        trainable=made,
        optimizer=optim.make_optimizer(config.optim, 10, made.specs),
        mesh=mesh,
        loss_chunk=5,
        groups=4,
    )
    state = step.abstract_state(job)
    asked = jnp.dtype("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {asked}
    several = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), batch
    )
    train = jax.jit(functools.partial(step.train_step, job)).trace(state, {}, several)
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


class Noise:
    """A model whose one logit is what its parameters say: losses show the key."""

    def hidden(self, weights, tokens, positions, segments):
        return jnp.full((*tokens.shape, 1), weights["noise"])

    def head(self, weights):
        return jnp.array([[1.0, 0.0]])


def test_dropout_differs_by_step_and_microbatch_and_is_off_in_evaluation():
    def forward(params, frozen, key):
        return {"noise": 0.0 if key is None else jax.random.uniform(key)}

    made = trainable.Trainable(
        specs={"w": Spec((1,), ("norm",), n_in=0)}, frozen_specs={},
        frozen_dtype=None, dtype=None, init=None, forward=forward,
    )  # fmt: skip
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    job = step.Job(Noise(), made, optax.sgd(0.0), mesh, loss_chunk=4)
    ids = np.zeros((2, 1, 4), np.int32)
    train = jax.jit(functools.partial(step.train_step, job))

    params = {"w": jnp.ones(1)}

    def loss(steps, microbatch):
        weights = np.zeros(ids.shape, np.float32)
        weights[microbatch] = 1.0
        state = step.init_state(job, params)
        state = dataclasses.replace(state, step=jnp.int32(steps))
        return float(
            train(state, {}, Batch(ids, ids, weights, ids, ids, ids))[1]["loss"]
        )

    seen = {loss(steps, part) for steps in (0, 1) for part in (0, 1)}
    assert len(seen) == 4
    assert loss(1, 1) in seen
    one = Batch(ids[0], ids[0], np.ones((1, 4), np.float32), ids[0], ids[0], ids[0])
    found = step.eval_step(job, params, {}, one)
    np.testing.assert_allclose(found["loss"], 4 * np.log(2.0), rtol=1e-6)
