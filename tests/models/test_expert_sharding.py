"""Experts over eight devices give what one device gives, gradients included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, close, mesh_sizes, random_params

from research.config.knob_groups import ModelConfig
from research.core.errors import UserError
from research.models.architecture import Experts
from research.models.make_model import make_model
from research.models.parts.expert_dispatch import mix_experts
from research.models.parts.expert_sharding import make_mix_experts
from research.models.parts.experts import compute_experts
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.weights.parameter_spec import Spec

EXPERTS, TOP, EMBED, MLP = 8, 2, 6, 10
UP = Spec((EXPERTS, EMBED, MLP), ("expert", "expert_embed", "expert_mlp"))
DOWN = Spec((EXPERTS, MLP, EMBED), ("expert", "expert_mlp", "expert_embed"))
SPECS = {"gate": UP, "up": UP, "down": DOWN}


def every_expert(x_BTD, chosen_BTC, shares_BTC, matrices):
    """All experts for every token, and then a sum over the chosen ones."""
    share_BTE = (jax.nn.one_hot(chosen_BTC, EXPERTS) * shares_BTC[..., None]).sum(2)
    gate, up = (jnp.einsum("btd,edf->btef", x_BTD, matrices[n]) for n in ("gate", "up"))
    made = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, matrices["down"])
    return jnp.einsum("bted,bte->btd", made, share_BTE)


def tokens(rows, length):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, length, EMBED))
    chosen = rng.permuted(np.tile(np.arange(EXPERTS), (rows, length, 1)), axis=-1)
    chosen[-1, :, :TOP] = [1, 6]  # A row whose tokens all meet on two devices.
    chosen[0, -1] = EXPERTS  # A token of padding has no expert.
    shares = rng.uniform(0.1, 1.0, (rows, length, TOP))
    return np.float32(x), np.int32(chosen[..., :TOP]), np.float32(shares)


def run(mix, arrays, matrices):
    """The result, and the gradients of a function of it."""

    def loss(x, shares, matrices, chosen):
        y = mix(x, chosen, shares, matrices)
        return (jnp.sin(y) * np.arange(1.0, EMBED + 1)[None, None]).sum(), y

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    x, chosen, shares = arrays
    (_, y), found = jax.jit(grad)(x, shares, matrices, chosen)
    return y, found


@pytest.mark.parametrize(
    "sizes, rows, length",
    [
        (mesh_sizes(fsdp=2, expert=2, tensor=2), 8, 3),
        (mesh_sizes(data=2, expert=4), 1, 5),  # As a decoder: one row for all devices.
    ],
    ids=str,
)
def test_a_mesh_mixes_as_one_device(sizes, rows, length):
    rng = np.random.default_rng(1)
    matrices = {n: np.float32(rng.normal(size=s.shape)) for n, s in SPECS.items()}
    mesh, arrays = meshes.make_mesh(sizes), tokens(rows, length)
    placed = jax.device_put(matrices, meshes.shardings(SPECS, mesh))
    assert placed["up"].addressable_shards[0].data.shape[0] < EXPERTS
    alone = functools.partial(mix_experts, block=4)
    sharded = make_mix_experts(mesh, alone)

    def mix(x, chosen, shares, matrices):
        weights = {name: (kernel, None) for name, kernel in matrices.items()}
        compute = functools.partial(compute_experts, "silu")
        return sharded(compute, weights, x, chosen, shares, experts=EXPERTS)

    expected = run(every_expert, arrays, matrices)
    close(run(mix, arrays, placed), expected)
    assert np.abs(expected[0][0, -1]).max() == 0 < np.abs(expected[0][0, 0]).min()


def test_a_model_on_a_mesh_is_that_of_one_device(batch):
    """Rows over `fsdp` and `expert`, tokens of a row over `context`."""
    shape = dataclasses.replace(TINY, mlp=MLP, experts=Experts(EXPERTS, TOP))
    params = random_params(Model(shape).specs)
    mesh = meshes.make_mesh(mesh_sizes(fsdp=2, expert=2, context=2))
    config = ModelConfig(dtype="float32")
    model = make_model(config, shape, mesh, length=24, rows=8)
    placed = jax.device_put(params, meshes.shardings(model.specs, mesh))
    packed = [np.asarray(x) for x in (batch.tokens, batch.positions, batch.segments)]
    one, many = (
        jax.jit(m.hidden_and_load)(p, *packed)
        for m, p in ((Model(shape), params), (model, placed))
    )
    real = (packed[2] != 0)[..., None]
    close((many[0] * real, many[1]), (one[0] * real, one[1]))


def test_experts_that_do_not_divide_name_path_axis_and_remedy():
    shape = dataclasses.replace(TINY, embed=42, experts=Experts(6, 2))
    mesh = meshes.make_mesh(mesh_sizes(expert=2, tensor=2), jax.devices()[:4])
    said = (
        r"layers\.mlp\.down\.kernel: axis 'expert' of size 6 does not divide over "
        r"expert\*tensor=4; for config\.mesh\.expert times .*\.tensor use 1, 2, 3"
    )
    with pytest.raises(UserError, match=said):
        make_model(ModelConfig(), shape, mesh, length=8, rows=8)
