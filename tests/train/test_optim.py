"""Schedules, what each optimizer moves and decays, and the guard against spikes."""

import contextlib
import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, mesh_sizes, random_params
from small_run import one_device
from tiny_model import make_tiny_model

from research.checkpoints.run_identity import OF_ARRAYS
from research.config.choices import OPTIMIZERS
from research.config.cross_knob_rules import idle
from research.config.knobs import changed, facts_of, fields, flat
from research.config.run_config import Config, OptimConfig
from research.core.errors import UserError
from research.formats.base_model import open_base
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.tasks.task_registry import make_objective
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train import prepare_runs
from research.train.step import train_step
from research.train.step.definition_from_config import make_step_definition
from research.train.step.optimizers import make_optimizer, read_skipped, skip_outliers
from research.train.step.schedules import make_schedule
from research.weights import trainable
from research.weights.parameter_spec import Spec


def test_the_rate_warms_up_peaks_and_ends_at_its_share():
    config = OptimConfig(learning_rate=1e-3, warmup=0.1, final=0.1)
    rate = np.array([make_schedule(config, 100)(n) for n in range(101)])
    assert rate.argmax() == 10
    np.testing.assert_allclose(rate[[0, 5, 10, 100]], [0, 5e-4, 1e-3, 1e-4], rtol=1e-5)
    assert (np.diff(rate[10:]) < 0).all()
    np.testing.assert_allclose(rate[55], (1e-3 + 1e-4) / 2, rtol=1e-5)


def rates_of(schedule, **changes):
    config = OptimConfig(learning_rate=1.0, warmup=0.1, final=0.1, schedule=schedule)
    config = dataclasses.replace(config, **changes)
    return np.array([make_schedule(config, 100)(n) for n in range(101)])


def test_each_schedule_has_its_shape_after_the_warm_up():
    linear, constant = rates_of("linear"), rates_of("constant")
    np.testing.assert_allclose(linear[[10, 55, 100]], [1, 0.55, 0.1], rtol=1e-5)
    np.testing.assert_allclose(constant[10:], 1.0, rtol=1e-6)
    wsd = rates_of("wsd", decay=0.3)
    np.testing.assert_allclose(wsd[10:71], 1.0, rtol=1e-6)
    np.testing.assert_allclose(wsd[[85, 100]], [0.55, 0.1], rtol=1e-5)
    warm_ups = [rates_of(name)[:11] for name in ("cosine", "linear", "wsd", "constant")]
    np.testing.assert_allclose(warm_ups, [np.linspace(0, 1, 11)] * 4, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "updates"), [("cosine", [61, 100]), ("wsd", [100]), ("constant", [])]
)
def test_a_schedule_that_moves_with_more_steps_is_said(schedule, updates, caplog):
    """Where it does move: a stable rate stays, and so does a constant one."""
    optim = OptimConfig(learning_rate=1e-3, schedule=schedule, warmup=0.0, decay=0.2)
    before, now = (Config(steps=n, optim=optim) for n in (100, 200))
    history = SimpleNamespace(planned_steps=0)
    folder = SimpleNamespace(config=lambda: before)
    run = SimpleNamespace(folder=folder, config=now, history=history)
    moved = prepare_runs._moved_schedule(run, 60)
    assert list(moved) == [f"learning rate of update {n}" for n in updates]
    assert ("schedule moved" in caplog.text) == bool(updates)
    if schedule == "cosine":
        rates = [f"{make_schedule(optim, n)(61):.3g}" for n in (100, 200)]
        assert moved["learning rate of update 61"] == " -> ".join(rates)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_no_run_is_too_short_for_a_schedule(steps, warmup, schedule):
    schedule = make_schedule(OptimConfig(warmup=warmup, schedule=schedule), steps)
    rates = np.array([schedule(n) for n in range(1, steps + 1)])
    assert np.isfinite(rates).all() and (rates > 0).all()


def zeros(params):
    return {path: np.zeros(x.shape, x.dtype) for path, x in params.items()}


def specs_of(params):
    return jax.tree.map(lambda x: Spec(x.shape, ("rank",) * x.ndim, x.ndim - 1), params)


def moved(config, gradient, params, specs=None):
    """The mean change of each parameter by the first update."""
    optimizer = make_optimizer(config, 10, specs or specs_of(params))

    @jax.jit
    def means(gradient, params):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return jax.tree.map(jnp.mean, updates)

    return jax.tree.map(float, means(gradient, params))


def test_the_first_update_is_not_lost_to_a_rate_of_zero():
    config = OptimConfig(learning_rate=1e-2, warmup=0.5, clip_norm=0.0)
    update = moved(config, {"w": jnp.ones(3)}, {"w": jnp.ones(3)})
    # Adam's first update has the size of the rate: one fifth of the peak.
    np.testing.assert_allclose(update["w"], -2e-3, rtol=1e-3)


def test_weight_decay_spares_norms_and_biases():
    params = {
        "final_norm.scale": jnp.ones(4),
        "layers.mlp_norm.scale": jnp.ones((2, 4)),
        "layers.mlp.up.bias": jnp.ones((2, 4)),
        "layers.mlp.up.kernel": jnp.ones((2, 4, 4)),
    }
    still = jax.tree.map(jnp.zeros_like, params)
    update = moved(OptimConfig(weight_decay=0.5), still, params)
    assert update["final_norm.scale"] == update["layers.mlp_norm.scale"] == 0
    assert update["layers.mlp.up.bias"] == 0
    assert update["layers.mlp.up.kernel"] < 0


def test_weight_decay_reaches_the_factors_of_adapters():
    params = {"mlp.up.kernel": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}
    still = jax.tree.map(jnp.zeros_like, params)
    update = moved(OptimConfig(weight_decay=0.5), still, params)["mlp.up.kernel"]
    assert update["a"] < 0 and update["b"] < 0


def test_clipping_is_by_the_norm_of_all_gradients_together():
    """A large eps makes AdamW's update follow the gradient's size."""
    params = {"u": jnp.zeros(1), "w": jnp.zeros(1)}
    gradient = {"u": jnp.full(1, 30.0), "w": jnp.full(1, 40.0)}
    free = moved(OptimConfig(eps=1e6, clip_norm=0.0), gradient, params)
    clipped = moved(OptimConfig(eps=1e6, clip_norm=1.0), gradient, params)
    for name in params:
        np.testing.assert_allclose(clipped[name], free[name] / 50, rtol=1e-3)


RATE = 0.1


# One of each kind: a table, a head, one and two axes of inputs or outputs, norms.
PATHS = (
    "embedding.table",
    "head.kernel",
    "final_norm.scale",
    "layers.attention_norm.scale",
    "layers.attention.query.kernel",
    "layers.attention.output.kernel",
    "layers.mlp.up.kernel",
)


@pytest.fixture(scope="module")
def specs():
    every = Model(TINY).specs
    return {path: every[path] for path in PATHS}


@pytest.fixture(scope="module")
def first_update(specs):
    """`first_update(name, gradient, params)`, without clipping: compiled once each."""

    @functools.cache
    def compiled(name):
        config = OptimConfig(
            name=name, learning_rate=RATE, warmup=0.0, clip_norm=0.0, weight_decay=0.5
        )
        optimizer = make_optimizer(config, 10, specs)

        def update(gradient, params):
            return optimizer.update(gradient, optimizer.init(params), params)[0]

        return jax.jit(update)

    return lambda name, gradient, params: compiled(name)(gradient, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_matrices_and_no_norms(name, specs, first_update):
    params = random_params(specs)
    rate = float(make_schedule(OptimConfig(learning_rate=RATE, warmup=0.0), 10)(1))
    for path, update in first_update(name, zeros(params), params).items():
        expected = 0.0 if path.endswith("scale") else -0.5 * rate * params[path]
        np.testing.assert_allclose(update, expected, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_spares_what_is_named(name):
    """One kind of parameter, so that the names alone decide."""
    spec = Model(TINY).specs["head.kernel"]
    specs = {"embedding.table": spec, "head.kernel": spec}
    params = random_params(specs)
    config = OptimConfig(name=name, weight_decay=0.5, no_decay=("scale$", "embedding"))
    update = moved(config, zeros(params), params, specs)
    assert update["embedding.table"] == 0.0 != update["head.kernel"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill_at_about_its_rate(name, specs, first_update):
    """Against the gradient, by a size that the rate alone sets, not the gradient's."""
    params = random_params(specs)
    slope = random_params(specs, seed=1)
    # At zero nothing decays.
    update = first_update(name, slope, zeros(params))
    for path, change in jax.tree.map(np.asarray, update).items():
        assert np.vdot(change, slope[path]) < 0, path
        size = np.sqrt(np.mean(change**2))
        assert 0.1 * RATE < size < 2 * RATE, path


def test_muon_makes_each_layers_matrix_orthogonal_and_leaves_tables_to_adam(
    specs, first_update
):
    slope = random_params(specs, seed=1)
    update = first_update("muon", slope, zeros(slope))
    for path, spec in specs.items():
        if not spec.n_in:
            continue
        inputs = math.prod(spec.in_shape)
        layers = np.array(update[path]).reshape(
            math.prod(spec.shape[: spec.stacked]), inputs, -1
        )
        values = [np.linalg.svd(one, compute_uv=False) for one in layers]
        spread = max(np.quantile(s, 0.9) / np.quantile(s, 0.3) for s in values)
        # About 2 to 4 for a random matrix; Newton and Schulz make them nearly equal.
        assert (spread < 1.7) == bool(spec.stacked), (path, spread)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_split_as_their_parameters(name, specs):
    """Nothing as large as a matrix lies whole on a device."""
    config = Config(trainable="full", optim=OptimConfig(name=name))
    mesh = meshes.make_mesh(mesh_sizes(1, 8))
    wide = dataclasses.replace(TINY, embed=256, mlp=512, vocab=768, head_dim=32)
    model = Model(wide)
    definition = train_step.StepDefinition(
        model,
        trainable.make(config.trainable, config.model, config.lora, model.specs),
        make_optimizer(config.optim, 10, model.specs),
        mesh,
        objective=CrossEntropy(groups=1, chunk=5, shards=meshes.shards(mesh)),
    )
    state = train_step.abstract_state(definition)
    norms = max(math.prod(s.shape) for s in model.specs.values() if not s.n_in)
    for leaf in jax.tree.leaves(state):
        part = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert part <= max(math.prod(leaf.shape) / 8, norms * 2, 1024), leaf
    if name == "adafactor":
        moments = sum(math.prod(x.shape) for x in jax.tree.leaves(state.opt_state))
        whole = sum(math.prod(s.shape) for s in model.specs.values())
        assert moments < whole / 10, "row and column statistics only"


def test_a_pattern_that_is_no_expression_is_refused(specs):
    with pytest.raises(UserError, match="not a regular expression"):
        make_optimizer(OptimConfig(no_decay=("(",)), 10, specs)


GUARD = skip_outliers(
    optax.with_extra_args_support(optax.adam(0.1)), spread=4.0, window=8
)
guarded_update = jax.jit(GUARD.update)


def guarded(values):
    """Trains one number on `(loss, gradient)` pairs; what was skipped, and where."""
    params = {"w": np.float32(0.0)}
    state = GUARD.init(params)
    skipped, states = [], []
    for loss, slope in values:
        before = int(state.skipped)
        moved, state = guarded_update(
            {"w": np.float32(slope)}, state, params, loss=np.float32(loss)
        )
        if int(state.skipped) > before:
            skipped.append(len(states))
            assert float(moved["w"]) == 0.0
        states.append((float(moved["w"]), jax.tree.map(np.array, state.inner)))
    return skipped, states, state


def test_moments_of_bfloat16_parameters_decay_as_those_of_float32():
    """In bfloat16 0.999 is 1, and a second moment would never leave its peak."""
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"w": jnp.ones(3, dtype)}
        optimizer = make_optimizer(OptimConfig(b2=0.999), 10, specs_of(params))
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for slope in (0.5, 0.0, 0.0):
            moved, state = update({"w": jnp.full(3, slope)}, state, params)
        found.append((moved, state))
    jax.tree.map(np.testing.assert_array_equal, *found)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(found[1])}
    assert kinds == {"float32", "int32"}


CALM = [(2.0 + 0.1 * math.sin(n), 1.0 + 0.1 * math.cos(n)) for n in range(20)]


def test_a_calm_run_skips_nothing():
    assert guarded(CALM)[0] == []


@pytest.mark.parametrize(
    "spike", [(9.0, 1.0), (2.0, 9.0), (math.nan, 1.0), (2.0, math.inf)], ids=str
)
def test_a_spike_is_skipped_and_leaves_no_trace_in_the_moments(spike):
    skipped, states, state = guarded([*CALM, spike, *CALM])
    assert skipped == [20]
    jax.tree.map(np.testing.assert_array_equal, states[20][1], states[19][1])
    assert read_skipped((state,)) == {"skipped": 1}
    assert read_skipped((state.inner,)) == {}


def test_before_enough_is_known_only_what_is_not_finite_is_skipped():
    assert guarded([(2.0, 1.0), (50.0, 30.0)])[0] == []
    assert guarded([(math.nan, 1.0), (2.0, 1.0)])[0] == [0]


def test_a_new_level_is_accepted_in_time():
    skipped, _, _ = guarded([*CALM, *[(9.0, 1.0)] * 8])
    assert skipped[0] == 20 and len(skipped) < 8


def test_the_schedule_goes_on_through_skipped_steps(specs):
    """Else a run that skipped some would end above its last rate."""
    specs = {"head.kernel": specs["head.kernel"]}
    params = random_params(specs)
    config = OptimConfig(
        name="lion", warmup=0.0, schedule="linear", final=0.0, clip_norm=0.0,
        learning_rate=1.0, skip_spread=5.0,
    )  # fmt: skip
    optimizer = make_optimizer(config, 10, specs)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    slope = {path: np.ones_like(x) for path, x in params.items()}
    sizes = []
    for loss in (1.0, math.nan, 1.0):
        moved, state = update(slope, state, params, loss=jnp.float32(loss))
        sizes.append(float(jnp.abs(moved["head.kernel"]).max()))
    rate = make_schedule(config, 10)
    np.testing.assert_allclose(sizes, [rate(1), 0.0, rate(3)], rtol=1e-5)


def test_a_pattern_that_spares_nothing_is_refused(specs):
    with pytest.raises(UserError, match="matches no parameter"):
        make_optimizer(OptimConfig(no_decay=("scale$", "embeding")), 10, specs)


# -- what no flag can accept -----------------------------------------------------------


def other_value(path, field, value):
    """A value that the knob may have and that differs."""
    facts = facts_of(field)
    if facts.choices:
        return next((x for x in facts.choices if x != value), value)
    if isinstance(value, tuple):
        return {
            "lora.rank_pattern": ("query=2",),
            "lora.alpha_pattern": ("query=2",),
            "lora.full": ("norms",),
            "optim.rate_pattern": ("query=2",),
        }.get(path, ("query",))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 8
    return value / 2 if value else 0.5


def test_the_knobs_that_no_flag_can_accept_are_those_that_change_arrays(tmp_path):
    """For every knob that a resumed run keeps: the arrays of its state, both ways."""
    base = open_base(str(make_tiny_model(tmp_path / "model")))
    mesh = one_device()

    def arrays(config):
        objective = make_objective(config, mesh)
        definition = make_step_definition(config, base, mesh, objective)
        state = train_step.abstract_state(definition)
        return [(str(k), x.shape) for k, x in jax.tree.leaves_with_path(state)]

    found = set()
    skips = OptimConfig(skip_spread=3.0)
    for config in (Config(), Config(trainable="full"), Config(optim=skips)):
        usual = arrays(config)
        for path, field, value in fields(config):
            of_state = path.startswith(("lora.", "optim.", "trainable"))
            if not of_state or not facts_of(field).fixed or path in idle(config):
                continue
            with contextlib.suppress(UserError):
                other = changed(config, {path: other_value(path, field, value)}, "test")
                new = flat(other)[path]
                moves = path in OF_ARRAYS and OF_ARRAYS[path](value) != OF_ARRAYS[path](
                    new
                )
                assert (arrays(other) != usual) == moves, path
                found |= {path} if moves else set()
    assert found == OF_ARRAYS.keys() - {"model.preset"}  # The tiny model is none.


def test_a_rate_pattern_multiplies_the_rate_of_its_paths():
    """LoRA+: the factor applies to the whole update, decay included, as in PEFT."""
    specs = {"m": {name: Spec((4,), ("rank",), n_in=0) for name in ("a", "b")}}
    params = jax.tree.map(lambda spec: jnp.ones(spec.shape), specs)
    config = OptimConfig(warmup=0.0, clip_norm=0.0, weight_decay=0.1)
    plain = moved(config, params, params, specs)["m"]
    plus = dataclasses.replace(config, rate_pattern=(r"\.b$=16",))
    found = moved(plus, params, params, specs)["m"]
    assert found["a"] == plain["a"]
    np.testing.assert_allclose(found["b"], 16 * plain["b"], rtol=1e-6)
    for pattern, said in (("beta=2", "matches no parameter"), ("b", "pattern=number")):
        with pytest.raises(UserError, match=said):
            bad = dataclasses.replace(config, rate_pattern=(pattern,))
            make_optimizer(bad, 10, specs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_fixed_does_not_move_and_has_no_moments(name):
    spec = Spec((2, 4, 6), ("layers", "embed", "rank"), stacked=1)
    specs = {"m": {"a": spec, "a0": dataclasses.replace(spec, fixed=True)}}
    params = jax.tree.map(lambda spec: jnp.ones(spec.shape), specs)
    slope = {"m": {"a": params["m"]["a"], "a0": jnp.zeros_like(params["m"]["a0"])}}
    config = OptimConfig(name=name, warmup=0.0, weight_decay=0.1)
    found = moved(config, slope, params, specs)["m"]
    assert found["a0"] == 0 and found["a"] < 0
    alone = {"m": {"a": spec}}, {"m": {"a": params["m"]["a"]}}
    states = [
        make_optimizer(config, 10, s).init(p) for s, p in ((specs, params), alone)
    ]
    assert len(jax.tree.leaves(states[0])) == len(jax.tree.leaves(states[1]))
