"""A batch in which each row has an adapter of its own, or none, over one base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, close, in_soak, mesh_sizes, random_adapters, random_params

from research.config.run_config import LoRAConfig
from research.core.errors import UserError
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.weights.adapters import serving_bank
from research.weights.adapters.adapter_registry import find_kind
from research.weights.contraction import contract, lookup, materialize, transpose
from research.weights.parameter_spec import Spec
from research.weights.representations import adapter_bank
from research.weights.representations.adapter_bank import AdapterBank
from research.weights.representations.leaf import Leaf
from research.weights.representations.low_rank import LowRank

# Ranks, targets, scales and kinds differ.
CONFIGS = (
    LoRAConfig(rank=4, alpha=8.0),
    LoRAConfig(rank=2, alpha=1.0, targets=("query", r"mlp\.down", "embedding")),
    LoRAConfig(
        kind="dora",
        rank=3,
        alpha=6.0,
        rank_pattern=("output=1",),
        targets=("query", "output", "embedding"),
    ),
)
ROOM = {"adapters": 4, "rank": 4, "gains": True}
CHOICE = (2, 0, 3, 1)
TIED = Model(dataclasses.replace(TINY, tied_head=True))


@functools.cache
def adapted(model, index):
    """The parameters with adapter `index`, counted from 1, and no other."""
    params = random_params(model.specs)
    if not index:
        return params
    config = CONFIGS[index - 1]
    kind = find_kind(config.kind)
    factors = random_adapters(kind.specs(model.specs, config), seed=index)
    if kind.has_gains:  # Lengths that differ from those of the weights by a tenth.
        start = kind.init(jax.random.key(0), model.specs, config, params)
        for path, own in factors.items():
            own["magnitude"] = start[path]["magnitude"] * (1 + own["magnitude"])
    return kind.adapt(params, factors, config)


def merged(model, index):
    """As `adapted`, in plain arrays: one program computes all of them."""
    whole = {}
    for path, leaf in adapted(model, index).items():
        whole[path] = np.asarray(materialize(leaf))
    return whole


def full_bank(model, loaded=(1, 2, 3), **room):
    """A bank that holds `loaded`, adapter i as number i."""
    matrices = [path for path, spec in model.specs.items() if spec.n_in]
    params = serving_bank.bank(
        random_params(model.specs), model.specs, **(ROOM | room), paths=matrices
    )
    for index in loaded:
        row = serving_bank.bank_row(params, adapted(model, index))
        params = serving_bank.set_row(params, index, row)
    return params


@functools.cache
def program(model):
    """Logits `[B, T, V]`; the choice is an argument, as in a decoder."""

    @jax.jit
    def logits(params, tokens, choice):
        weights = serving_bank.rows(params, choice)
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model.hidden(weights, tokens, at, jnp.ones_like(tokens))
        return model.logits(weights, hidden)

    return logits


def tokens(rows=4, length=6):
    return np.random.default_rng(3).integers(0, TINY.vocab, (rows, length), np.int32)


def answers(model, params, choice=CHOICE, length=6):
    choice = np.array(choice, np.int32)
    return np.asarray(program(model)(params, tokens(len(choice), length), choice))


@pytest.mark.parametrize("gathers", [False, in_soak(True)], ids=["all", "gathered"])
def test_each_row_is_that_of_its_adapter_alone(monkeypatch, gathers):
    monkeypatch.setattr(adapter_bank, "GATHER_ABOVE", 0 if gathers else 4)
    program.cache_clear()
    found, base = answers(TIED, full_bank(TIED)), answers(TIED, adapted(TIED, 0))
    for row, index in enumerate(CHOICE):
        close(found[row], answers(TIED, merged(TIED, index))[row], rtol=1e-4)
        changed = np.abs(found[row] - base[row]).max()
        assert changed > 0.1 if index else changed == 0, "row 0 is the base exactly"
    program.cache_clear()


@pytest.mark.parametrize("gathers", [False, True], ids=["all at once", "gathered"])
def test_a_row_depends_on_nothing_but_its_adapter(monkeypatch, gathers):
    """Bit for bit: not on the choices of others, nor on the rest of the bank."""
    monkeypatch.setattr(adapter_bank, "GATHER_ABOVE", 0 if gathers else 4)
    rng = np.random.default_rng(0)
    spec = Spec((72, 56), ("embed", "mlp"))
    base = {"w": jnp.float32(rng.normal(size=spec.shape))}

    def low(rank):
        a, b = rng.normal(size=(72, rank)), rng.normal(size=(rank, 56))
        return {"w": LowRank(base["w"], *map(jnp.float32, (a, b)), jnp.float32(2))}

    own, other, x = low(5), low(16), jnp.float32(rng.normal(size=(4, 72)))
    empty = serving_bank.bank(base, {"w": spec}, 4, 16, paths=["w"])
    product = jax.jit(lambda params, choice: contract(x, params["w"].bound(choice)))

    def answer(rows, choice):
        params = jax.tree.map(jnp.copy, empty)
        for index, adapter in rows.items():
            row = serving_bank.bank_row(params, adapter)
            params = serving_bank.set_row(params, index, row)
        return np.asarray(product(params, np.array(choice, np.int32)))

    alone = answer({1: own}, [1, 1, 1, 1])
    close(alone, contract(x, own["w"]))
    for index in (1, 2, 3):
        rows = {1: other, 2: other, 3: other} | {index: own}
        for place in range(4):
            choice = [(index + 1) % 4] * 4
            choice[place] = index
            found = answer(rows, choice)
            np.testing.assert_array_equal(found[place], alone[place])
            assert (found != alone).any()


def test_a_single_row_computes_with_its_adapter_alone(model):
    """A chunk of one prompt costs what one adapter costs, and gives the same values."""
    params = full_bank(model)
    for index in (0, 2, 3):
        weights = serving_bank.rows(params, jnp.array([index]))
        assert not any(isinstance(leaf, AdapterBank) for leaf in weights.values())
        close(
            answers(model, params, [index])[0], answers(model, params, [index] * 4)[0]
        )


def test_a_new_adapter_compiles_nothing_and_leaves_the_others(model):
    params = full_bank(model, (1,))
    before = answers(model, params)
    write, compute = serving_bank._write._cache_size, program(model)._cache_size
    counts = write(), compute()
    for index in (2, 3):
        row = serving_bank.bank_row(params, adapted(model, index))
        params = serving_bank.set_row(params, index, row)
    after = answers(model, params)
    assert (write(), compute()) == counts
    for row, index in enumerate(CHOICE):
        change = np.abs(before[row] - after[row]).max()
        assert change > 0.1 if index > 1 else change == 0
    # An adapter that is gone leaves the base, whatever its rank and targets were.
    emptied = serving_bank.set_row(params, 2, serving_bank.bank_row(params, {}))
    np.testing.assert_array_equal(
        answers(model, emptied, [2] * 4), answers(model, emptied, [0] * 4)
    )


def test_rows_are_written_in_place(model):
    params = full_bank(model, (1,))
    path = "layers.mlp.up.kernel"
    where = params[path].a.unsafe_buffer_pointer()
    row = serving_bank.bank_row(params, adapted(model, 2))
    after = serving_bank.set_row(params, 2, row)
    assert after[path].a.unsafe_buffer_pointer() == where
    assert params[path].a.is_deleted() and not after[path].base.is_deleted()


def test_a_bank_over_eight_devices_is_that_of_one(model):
    mesh = meshes.make_mesh(mesh_sizes(fsdp=2, tensor=4))
    where = meshes.shardings(model.specs, mesh)
    base = {p: jax.device_put(x, where[p]) for p, x in adapted(model, 0).items()}

    def zeros(spec, dtype):
        sharding = meshes.shardings({"x": spec}, mesh)["x"]
        return jax.device_put(np.zeros(spec.shape, dtype), sharding)

    params = serving_bank.bank(base, model.specs, **ROOM, zeros=zeros)
    before = jax.tree.map(lambda x: x.sharding, params)
    up = params["layers.mlp.up.kernel"]
    assert up.a.sharding.spec[2] == "fsdp" and up.b.sharding.spec[2] == "tensor"
    params = serving_bank.set_row(
        params, 2, serving_bank.bank_row(params, adapted(model, 1))
    )
    assert jax.tree.map(lambda x: x.sharding, params) == before
    one = serving_bank.bank(adapted(model, 0), model.specs, **ROOM)
    one = serving_bank.set_row(one, 2, serving_bank.bank_row(one, adapted(model, 1)))
    close(answers(model, params), answers(model, one))


@pytest.mark.soak
def test_factors_in_the_dtype_of_activations_give_the_same_bits(model):
    """They are cast before each product anyway, and half the bytes are read."""
    half = model.with_options(dtype=jnp.bfloat16)
    found = [
        answers(half, full_bank(model, dtype=dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    np.testing.assert_array_equal(*found)


@dataclasses.dataclass(frozen=True)
class OtherLeaf(Leaf):
    shape = contract = lookup = transpose = materialize = None


def test_what_has_no_room_is_refused_in_one_sentence(model):
    narrow = serving_bank.bank(adapted(model, 0), model.specs, adapters=2, rank=3)
    with pytest.raises(UserError, match=r"has rank 4, and .* ranks up to 3: start it"):
        serving_bank.bank_row(narrow, adapted(model, 1))
    with pytest.raises(UserError, match=r"changes embedding.table, and .* room only"):
        serving_bank.bank_row(narrow, adapted(model, 2))
    path = "layers.attention.query.kernel"
    with pytest.raises(UserError, match=r"kernel is DoRA, and .* room only for low-ra"):
        serving_bank.bank_row(narrow, {path: adapted(model, 3)[path]})
    with pytest.raises(UserError, match="is a OtherLeaf, and only low-rank updates"):
        serving_bank.bank_row(narrow, {"layers.mlp.up.kernel": OtherLeaf()})
    path = "layers.mlp.down.kernel"
    low = adapted(model, 2)[path]
    diverged = dataclasses.replace(low, b=low.b.at[0, 0, 0].set(np.nan))
    with pytest.raises(UserError, match=r"not finite \(.*mlp.down.*an earlier step"):
        serving_bank.bank_row(narrow, {path: diverged})
    with pytest.raises(ValueError, match="0 is the base"):
        serving_bank.set_row(narrow, 0, serving_bank.bank_row(narrow, {}))


def test_other_adapters_that_are_not_finite_do_not_spread():
    """An input that overflows in the factors of one adapter harms its own rows."""
    spec = Spec((6, 5), ("embed", "mlp"))
    params = serving_bank.bank({"w": jnp.ones((6, 5))}, {"w": spec}, 3, 2, paths=["w"])[
        "w"
    ]
    huge = dataclasses.replace(params, a=params.a.at[2:].set(3e38))
    x = jnp.full((2, 6), 10.0)
    found = contract(x, huge.bound(jnp.array([2, 1])))
    np.testing.assert_array_equal(found[1], contract(x, jnp.ones((6, 5)))[1])


@pytest.mark.parametrize("shape, n_in", [((7, 5), 1), ((7, 4, 5), 1), ((4, 5, 7), 2)])
def test_matrices_of_every_shape_from_both_sides(shape, n_in):
    rng = np.random.default_rng(0)
    spec = Spec(shape, ("embed", "heads", "head_dim")[: len(shape)], n_in)
    w = jnp.float32(rng.normal(size=shape))
    whole = serving_bank.bank({"w": w}, {"w": spec}, 3, 2, paths=["w"], gains=True)["w"]
    drawn = {x: getattr(whole, x).shape for x in ("a", "b", "scale", "stretch")}
    drawn = {x: jnp.float32(rng.normal(size=size)) for x, size in drawn.items()}
    whole = dataclasses.replace(whole, **drawn)
    choice = jnp.array([1, 2, 2, 0])
    x = jnp.float32(rng.normal(size=(4, 3, *shape[:n_in])))
    found = contract(x, whole.bound(choice), n_in)
    for i in range(4):
        close(found[i], contract(x[i : i + 1], whole.bound(choice[i : i + 1]), n_in)[0])
    if len(shape) > 2:
        return
    flipped, back = transpose(whole.bound(choice)), jnp.float32(rng.normal(size=(4, 5)))
    ids = jnp.array([[0, 3], [6, 6], [2, 1], [4, 4]])
    rows = lookup(whole.bound(choice), ids, jnp.float32)
    assert flipped.shape == (5, 7)
    for i in range(4):
        alone = whole.bound(choice[i : i + 1])
        close(contract(back, flipped)[i], contract(back[i], transpose(alone)))
        close(rows[i], lookup(alone, ids[i], jnp.float32))
