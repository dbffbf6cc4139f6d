"""Parameters that are trained whole beside adapters: `config.lora.full`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, random_adapters, random_params
from peft_exports import model_of

from research.config.run_config import LoRAConfig, ModelConfig
from research.core.errors import UserError
from research.models.transformer import Model
from research.train.metrics import throughput
from research.weights import parameter_paths, trainable

NORMS = {
    "layers.attention_norm.scale", "layers.mlp_norm.scale", "final_norm.scale"
}  # fmt: skip
TIED = Model(dataclasses.replace(TINY, tied_head=True))


def split_of(model, dtype="float32", **lora):
    config = ModelConfig(dtype=dtype)
    return trainable.make("lora", config, LoRAConfig(rank=2, **lora), model.specs)


@pytest.mark.parametrize(
    "full, expected",
    [
        (("norms",), NORMS),
        (("embeddings", "head"), {"embedding.table", "head.kernel"}),
        (("norms, lm_head",), NORMS | {"head.kernel"}),
        (("input_layernorm", "embed_tokens"), {"layers.attention_norm.scale",
                                               "embedding.table"}),
        (("final_norm", r"^emb"), {"final_norm.scale", "embedding.table"}),
        ((), set()),
    ],
    ids=str,
)  # fmt: skip
def test_parameters_are_chosen_by_group_name_and_path(model, full, expected):
    split = split_of(model, full=full)
    assert split.full == expected
    adapted = split_of(model).specs
    assert split.specs == adapted | {path: model.specs[path] for path in expected}
    assert split.adapters(split.specs) == adapted
    assert split.frozen_specs == dict(model.specs)


def test_biases_and_places_belong_to_their_groups():
    neox, gpt2 = model_of("gpt_neox"), model_of("gpt2")
    biases = {path for path in neox.specs if path.endswith(".bias")}
    assert len(biases) > 6 and split_of(neox, full=("biases",)).full == biases
    norms = split_of(neox, full=("norms",)).full
    assert {path.rpartition(".")[2] for path in norms} == {"scale", "bias"}
    tables = {"embedding.table", "position_embedding.table"}
    assert split_of(gpt2, full=("embeddings",)).full == tables
    # Bias tuning has no adapters.
    alone = split_of(neox, targets=(), full=("biases",))
    assert alone.specs.keys() == alone.full == biases


@pytest.mark.parametrize(
    "model, lora, said",
    [
        (TIED, {"full": ("norm", "nrms")}, "'nrms' matches no parameter (did you mean"),
        (TIED, {"full": ("biases",)}, "'biases' matches no parameter"),
        (TIED, {"full": ("norms, head",)}, "names 'head', and this model's head is"),
        (TIED, {"full": ("lm_head",)}, "name 'embeddings', which trains both ends"),
        (TIED, {"full": ("mlp.up",)}, "mlp.up.kernel whole, and config.lora.tar"),
        (TIED, {"full": (), "targets": ()}, "nothing would be trained"),
        (TIED, {"full": ("(",)}, "is not a regular expression"),
    ],
)  # fmt: skip
def test_a_bad_choice_is_refused(model, lora, said):
    with pytest.raises(UserError) as raised:
        split_of(model, **lora)
    assert said in str(raised.value)


def test_what_trains_whole_stays_an_array(model):
    config = ModelConfig(quantize="nf4")
    split = trainable.make(
        "lora", config, LoRAConfig(full=("embeddings",)), model.specs
    )
    for path, spec in model.specs.items():
        is_array = path == "embedding.table" or not spec.n_in
        assert (split.frozen_specs[path] == spec) is is_array, path


def test_they_start_at_the_base_and_take_its_place(model):
    split = split_of(model, "bfloat16", full=("norms", "embeddings"))
    base = {
        path: x.astype(jnp.bfloat16) for path, x in random_params(model.specs).items()
    }
    start = jax.jit(split.init)(jax.random.key(0), base)
    assert {x.dtype for x in jax.tree.leaves(start)} == {jnp.dtype("float32")}
    for path in split.full:
        np.testing.assert_array_equal(start[path], base[path].astype(jnp.float32))
    moved = random_adapters(split.adapters(split.specs))
    moved |= {path: start[path] + 1.0 for path in split.full}
    weights = split.forward(moved, base, None)
    assert weights.keys() == base.keys()
    assert all(weights[path] is moved[path] for path in split.full)
    off = split.off(moved, base)
    assert jax.tree.structure(off) == jax.tree.structure(moved)
    computed = split.forward(off, base, None)
    for path in model.specs:
        leaf = computed[path]
        value = leaf if path in split.full else getattr(leaf, "base", leaf)
        np.testing.assert_array_equal(value, base[path].astype(value.dtype))
        assert not np.any(getattr(leaf, "b", 0))


def test_a_whole_parameter_costs_its_own_gradient(model):
    def flops(**lora):
        split = split_of(model, **lora)
        counted = throughput.count_trained(split.specs, split, model)
        return throughput.count_flops(model.architecture, **counted)

    plain, matrix = flops(targets=("attention",)), "layers.mlp.up.kernel"
    more = flops(targets=("attention",), full=("mlp.up", "norms"))
    gradient = 2 * parameter_paths.count(model.specs[matrix])
    assert more.per_token - plain.per_token == pytest.approx(gradient, abs=6)
    assert more.per_weight == plain.per_weight == 4 * 96 * 40
    assert flops(full=("head",)).per_weight == 6 * 96 * 40
    assert flops(full=("embeddings",)).per_weight == 4 * 96 * 40
