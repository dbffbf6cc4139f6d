"""Every kind of adapter trains alike on every mesh, and in a pack of its kind."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported_models import tiny_export
from helpers import close, mesh_sizes
from small_run import make_small_place, one_device, small_config, small_hidden

from research.config.choices import ADAPTER_MODULES
from research.config.run_config import LoRAConfig, OptimConfig
from research.core.errors import UserError
from research.formats.export_format import ExportOptions
from research.formats.huggingface.huggingface_export import FORMAT
from research.parallel import mesh as meshes
from research.runs.metrics_file import read_metrics
from research.runs.reopen import reopen
from research.train import start_to_report
from research.train.together import compatibility
from research.weights.adapters.adapter_registry import find_kind
from research.weights.contraction import contract
from research.weights.parameter_spec import Spec

STEPS = 3
FEW = ("attention.output", "mlp.down")
# Without this eps Adam turns rounding in a gradient near zero into a full-size update.
OPTIM = OptimConfig(eps=1e-2)
RATES = {"vera": 0.3}  # Its few numbers need a higher one.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alike")
    make_small_place(folder)
    return folder


@pytest.fixture(scope="module")
def experts(small):
    """A model with experts in the place of the other one, over the same rows."""
    exported = tiny_export(max_position=512)
    (small / "experts").mkdir()
    FORMAT.write(exported, small / "experts", ExportOptions())
    return small


def config_for(small, name, kind, mesh=None, model="model", **changes):
    own = {"eva_batches": 2} if kind in ("eva", "qera") else {}
    own |= {"rank": 2, "targets": FEW} | changes
    codes = {"quantize": "nf4"} if kind in ("loftq", "qera") else {}
    config = small_config(small, name, STEPS, codes, lora=LoRAConfig(kind=kind, **own))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init_from=str(small / model)),
        optim=dataclasses.replace(OPTIM, learning_rate=RATES.get(kind, 1e-2)),
        data=dataclasses.replace(config.data, template="dolly"),
        export=False,
        mesh=mesh or config.mesh,
    )


def losses(folder):
    return [x["loss"] for x in read_metrics(Path(folder)) if x["kind"] == "train"]


def train_on_one(config):
    make = meshes.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda sizes: make(sizes, jax.devices()[:1]))
        assert start_to_report.train([config]) == 0


def check_alike(one, other):
    """The same losses, and in the end the same model."""
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-4)
    runs = [reopen(folder, one_device()) for folder in (one, other)]
    found, expected = (small_hidden(run.model, run.weights) for run in runs)
    close(found, expected, rtol=1e-3)
    assert np.abs(found - small_hidden(runs[0].model, runs[0].frozen)).max() > 1e-2


@pytest.mark.soak
@pytest.mark.parametrize("kind", ADAPTER_MODULES)
def test_every_mesh_trains_a_kind_as_one_device(small, kind):
    alone = config_for(small, f"{kind}-one", kind, mesh_sizes())
    train_on_one(alone)
    for number, sizes in enumerate(
        (mesh_sizes(fsdp=4, tensor=2), mesh_sizes(data=2, fsdp=2, tensor=2))
    ):
        spread = config_for(small, f"{kind}-{number}", kind, sizes)
        assert start_to_report.train([spread]) == 0
        check_alike(spread.run_dir, alone.run_dir)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["vera", "dora"])
def test_adapters_of_experts_train_over_an_expert_axis_as_on_one_device(experts, kind):
    alone = config_for(experts, f"{kind}-e-one", kind, mesh_sizes(), "experts")
    train_on_one(alone)
    sizes = mesh_sizes(fsdp=2, tensor=2, expert=2)
    spread = config_for(experts, f"{kind}-e", kind, sizes, "experts")
    assert start_to_report.train([spread]) == 0
    check_alike(spread.run_dir, alone.run_dir)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["dora", "vera"])
def test_a_run_in_a_pack_of_its_kind_equals_itself_alone(small, kind):
    own = [{"rank": 2, "dropout": 0.3}]
    own += [{"rank": 3, "layers": "1", "targets": ("mlp.down", "query")}]
    packs = [
        [
            dataclasses.replace(
                config_for(small, f"{kind}-{name}-{number}", kind, **changes),
                seed=number,
            )
            for number, changes in enumerate(own)
        ]
        for name in ("alone", "pack")
    ]
    for config in packs[0]:
        assert start_to_report.train([config]) == 0
    assert start_to_report.train(packs[1]) == 0
    for alone, packed in zip(*packs, strict=True):
        check_alike(packed.run_dir, alone.run_dir)
        runs = [reopen(Path(x.run_dir)) for x in (alone, packed)]
        shapes, others = (jax.tree.map(jnp.shape, run.params) for run in runs)
        assert shapes == others  # No padding remains.


@pytest.mark.parametrize("kind", ["dora", "vera"])
def test_padding_for_a_pack_changes_no_product_and_gets_no_gradient(kind):
    """The soak shows it of whole runs, this of one matrix."""
    rng, kind = np.random.default_rng(0), find_kind(kind)
    spec = Spec((12, 9), ("embed", "mlp"))
    config = LoRAConfig(rank=2, targets=("w",))
    base = {"w": jnp.float32(rng.normal(size=spec.shape))}
    own = kind.init(jax.random.key(0), {"w": spec}, config, base)
    own = jax.tree.map(lambda x: x + jnp.float32(0.1 * rng.normal(size=x.shape)), own)
    wide = kind.pad(own, kind.union({"w": spec}, [{"w": 2}, {"w": 5}]))
    settings = kind.settings({"w": 2}, config)
    x = jnp.float32(rng.normal(size=(7, spec.shape[0])))

    def product(adapters):
        return contract(x, kind.attach(base, adapters, settings)["w"])

    assert kind.rank(wide["w"]) == 5
    close(product(wide), product(own))
    slopes, expected = (
        jax.grad(lambda a: jnp.sum(jnp.square(product(a))))(a) for a in (wide, own)
    )
    close(slopes, kind.pad(expected, wide))


@pytest.mark.parametrize("kind", ADAPTER_MODULES)
def test_zeros_change_nothing_and_get_no_gradient(kind):
    """They stand for layers outside of lora.layers, and for matrices of other runs."""
    rng, kind = np.random.default_rng(0), find_kind(kind)
    spec = Spec((12, 9), ("embed", "mlp"))
    base = {"w": jnp.float32(rng.normal(size=spec.shape))}
    zeros = {
        "w": {n: jnp.zeros(x.shape) for n, x in kind.matrix_specs(spec, 4).items()}
    }
    settings = kind.settings({"w": 4}, LoRAConfig(rank=4, targets=("w",)))
    x = jnp.float32(rng.normal(size=(7, spec.shape[0])))

    def product(adapters):
        return contract(x, kind.attach(base, adapters, settings)["w"])

    np.testing.assert_array_equal(product(zeros), contract(x, base["w"]))
    slopes = jax.grad(lambda a: jnp.sum(jnp.square(product(a))))(zeros)
    assert not any(map(np.any, jax.tree.leaves(slopes)))


def test_kinds_of_the_same_arrays_are_a_pack_and_a_refusal_names_both(small):
    kinds = ("lora", "pissa", "eva", "dora", "vera")
    lora, pissa, eva, dora, vera = (config_for(small, x, x) for x in kinds)
    compatibility.check([lora, pissa, eva])
    for one, other in ((lora, vera), (pissa, dora), (dora, vera)):
        names = f"lora.kind='{one.lora.kind}' and .* '{other.lora.kind}': runs that"
        with pytest.raises(UserError, match=f"{names}.*arrays of its own"):
            compatibility.check([one, other])
        compatibility.check([one, dataclasses.replace(one, run_dir="elsewhere")])
