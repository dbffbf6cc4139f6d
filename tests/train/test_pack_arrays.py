"""Runs of several kinds in one program: each is judged by its own kind, and early."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import make_small_place, small_config

from research.config.run_config import LoRAConfig
from research.core.errors import UserError
from research.formats.base_model import open_base
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.tasks import task_registry
from research.train import doctor, prepare_runs, start_to_report
from research.train.programs import pack_arrays
from research.train.step.definition_from_config import load_start, make_step_definition
from research.weights.adapters.adapter_registry import find_kind

MATRIX = "layers.mlp.down.kernel"  # [64, 32]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    make_small_place(folder)
    return folder


@pytest.fixture(scope="module")
def specs(small):
    return Model(open_base(str(small / "model")).architecture).specs


def config_for(small, name, **lora):
    lora = LoRAConfig(**{"targets": (MATRIX,)} | lora)
    return small_config(small, name, 4, lora=lora)


@pytest.mark.parametrize(
    "others, rank, arrays",
    [
        ([{"kind": "orthogonal", "rank": 2}], 3, 2),
        ([{"kind": "eva", "rank": 2, "eva_rho": 1.5}], 3, 2),
        ([{"kind": "eva", "rank": 4}, {"kind": "orthogonal", "rank": 4}], 8, 2),
        ([{"kind": "pissa", "rank": 4}, {"kind": "eva", "rank": 10}], 20, 4),
    ],
)
def test_no_kind_judges_the_rank_of_another(small, specs, others, rank, arrays):
    configs = [config_for(small, "a", rank=3)]
    configs += [config_for(small, "b", **other) for other in others]
    for each in (configs, configs[::-1]):
        _, factors = pack_arrays.union(specs, each)
        assert [*factors] == [MATRIX] and len(factors[MATRIX]) == arrays
        assert factors[MATRIX]["a"].shape[-1] == rank


@pytest.mark.parametrize(
    "kind, first, second, said",
    [
        ("orthogonal", {"rank": 2}, {"rank": 3}, r"rank.* is 3"),
        ("dora", {"layers": "1"}, {"layers": "1-2"}, r"layers has 1-2, and"),
    ],
)
def test_a_pack_is_refused_before_anything_is_loaded_or_written(
    small, monkeypatch, kind, first, second, said
):
    for name in ("_load", "load_start"):
        monkeypatch.delattr(prepare_runs, name)
    configs = [
        config_for(small, f"{kind}-{i}", kind=kind, **own)
        for i, own in enumerate((first, second))
    ]
    with pytest.raises(UserError, match=said):
        start_to_report.train(configs)
    assert not any(Path(config.run_dir).exists() for config in configs)


@pytest.mark.parametrize("kind", ["lora", "eva"])
@pytest.mark.parametrize(
    "pattern, said",
    [
        ("query=abc", "'query=abc' is not 'pattern=number'"),
        ("query", "'query' is not 'pattern=number'"),
        ("query=2.5", r"query.* is 2.5; it must be a whole number"),
    ],
)
def test_a_rank_of_another_form_is_one_sentence(specs, kind, pattern, said):
    config = LoRAConfig(kind=kind, rank_pattern=(pattern,), targets=("attention",))
    with pytest.raises(UserError, match=said):
        find_kind(kind).specs(specs, config)
    # A rank that is whole has the room that its kind needs.
    config = dataclasses.replace(config, rank_pattern=("query=3",), rank=2)
    own = find_kind(kind).specs(specs, config)
    ranks = {path.split(".")[2]: x for path, x in find_kind(kind).ranks(own).items()}
    assert (ranks["query"], ranks["key"]) == ((6, 4) if kind == "eva" else (3, 2))


@pytest.mark.parametrize(
    "own, other",
    [
        ({}, {"rank": 5, "targets": (MATRIX, "query"), "kind": "pissa"}),
        ({"kind": "dora"}, {"rank": 3, "kind": "dora", "rslora": True}),
    ],
)
def test_programs_that_read_a_pack_serve_each_run_alike(small, specs, own, other):
    """Weights of one form for all, so nothing compiles twice; outputs are its own."""
    pair = ("a", {"rank": 2} | own), ("b", other)
    configs = [config_for(small, name, **lora) for name, lora in pair]
    wide = pack_arrays.union(specs, configs)
    base = open_base(str(small / "model"))
    mesh = meshes.make_mesh(configs[0].mesh)
    outputs, forms = None, []
    for number, config in enumerate(configs):
        objective = task_registry.make_objective(config, mesh)
        definition = make_step_definition(config, base, mesh, objective)
        outputs = outputs or doctor.make_outputs(definition)
        split = definition.trainable
        params, frozen = load_start(definition, base)
        keys = iter(jax.random.split(jax.random.key(number), 99))
        params = jax.tree.map(
            lambda x, keys=keys: x + 0.1 * jax.random.normal(next(keys), x.shape),
            params,
        )
        alike = pack_arrays.alike(config, split, specs, mesh, wide)
        found = alike.forward(params, frozen, None)
        forms.append(jax.tree.map(lambda x: (jnp.shape(x), x.dtype, x.sharding), found))
        alone = outputs(split.forward(params, frozen, None))
        np.testing.assert_allclose(outputs(found), alone, atol=2e-5)
        moved = jnp.abs(outputs(frozen) - alone).max()
        assert moved > 1e-2
    assert forms[0] == forms[1]
