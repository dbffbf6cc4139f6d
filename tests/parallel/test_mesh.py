"""Sizes of meshes, and where parameters lie on them."""

import dataclasses
import math
import re

import jax
import pytest
from helpers import TINY, mesh_sizes
from jax.sharding import PartitionSpec as P
from step_definitions import make_definition

from research.config.knob_groups import ModelConfig
from research.core.errors import UserError
from research.models.make_model import make_model
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.train.step import train_step
from research.weights.parameter_spec import Spec


def test_adapters_lie_as_their_base_kernels(model):
    definition, _ = make_definition(model, "lora", (2, 2, 2))
    found = {
        f"{path.split('.')[-2]}.{name}": sharding.spec
        for path, factors in train_step.state_shardings(definition).params.items()
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
def test_a_tensor_axis_leaves_no_matrix_whole(model, kind):
    """Nor the base under adapters, nor a moment; one factor of a pair stays whole."""
    definition, _ = make_definition(model, kind, (1, 1, 4))
    where = meshes.shardings(model.specs, definition.mesh)
    for path, spec in model.specs.items():
        part = math.prod(where[path].shard_shape(spec.shape)) / math.prod(spec.shape)
        assert part == (1.0 if "norm" in path else 1 / 4), path
    state = train_step.abstract_state(definition)
    matrices = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in matrices)
    assert held < (0.7 if kind == "lora" else 0.3) * sum(x.size for x in matrices)


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
        (
            {},
            (1, 2, 1, 1, 1, 3),
            r"embedding\.table: axis 'embed' of size 40 does not divide over "
            r"fsdp\*expert=6; for config\.mesh\.fsdp times config\.mesh\.expert use 1",
        ),
    ],
    ids=["heads", "embed", "two axes"],
)
def test_a_size_that_does_not_divide_names_path_axis_and_remedy(changes, sizes, said):
    specs = Model(dataclasses.replace(TINY, **changes)).specs
    with pytest.raises(UserError, match=said):
        devices = jax.devices()[: math.prod(sizes)]
        meshes.shardings(specs, meshes.make_mesh(mesh_sizes(*sizes), devices))


def test_experts_lie_whole_and_all_else_is_split_by_their_axis_too():
    matrix = Spec((3, 8, 40, 56), ("layers", "expert", "expert_embed", "expert_mlp"))
    mesh = meshes.make_mesh(mesh_sizes(fsdp=2, expert=2, tensor=2))
    found = meshes.shardings(
        {"up": matrix, "table": Spec((96, 40), ("vocab", "embed"))}, mesh
    )
    assert found["up"].spec == P(None, ("expert", "tensor"), "fsdp", None)
    assert found["table"].spec == P("tensor", ("fsdp", "expert"))
    assert meshes.batch_shards(mesh) == 4
    three = meshes.make_mesh(mesh_sizes(expert=3), jax.devices()[:3])
    with pytest.raises(UserError, match=r"up: axis 'expert' of size 8.*1, 2, 4, 8"):
        meshes.shardings({"up": matrix}, three)


def test_a_model_without_experts_refuses_devices_for_them():
    mesh = meshes.make_mesh(mesh_sizes(expert=2, fsdp=4))
    said = r"config\.mesh\.expert is 2.* no experts.*config\.mesh\.fsdp"
    with pytest.raises(UserError, match=said):
        make_model(ModelConfig(), TINY, mesh, length=8, rows=8)


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
        "replica": 1, "data": 2, "fsdp": 2, "expert": 1, "tensor": 2, "context": 1,
    }  # fmt: skip
