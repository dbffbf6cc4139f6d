"""`config.model.quantize_paths` gives some matrices of a base another format."""

import math

import pytest
from helpers import TINY

from research.config.choices import normalised
from research.config.knobs import changed
from research.config.run_config import Config, LoRAConfig, ModelConfig
from research.core.errors import UserError
from research.models.transformer import Model
from research.runs.lineage import base_of_run
from research.weights import trainable
from research.weights.parameter_spec import Spec

SPECS = Model(TINY).specs
KEY, DOWN = "layers.attention.key.kernel", "layers.mlp.down.kernel"
TABLE = "embedding.table"


def frozen(*overrides, full=()):
    model = ModelConfig(quantize="nf4", quantize_paths=overrides)
    split = trainable.make("lora", model, LoRAConfig(full=full), SPECS)
    return split.frozen_specs


def forms(*overrides):
    return {
        path: "none" if isinstance(form, Spec) else form.form
        for path, form in frozen(*overrides).items()
    }


def test_the_last_pattern_that_matches_counts():
    plain = forms()
    assert {plain[KEY], plain[DOWN]} == {"nf4"} and plain[TABLE] == "int8"
    found = forms("mlp=int8", "k_proj,v_proj=none", "down_proj=int4", "table=none")
    other = {path: form for path, form in found.items() if form != plain[path]}
    assert other == {
        "layers.mlp.gate.kernel": "int8",
        "layers.mlp.up.kernel": "int8",
        DOWN: "int4",
        KEY: "none",
        "layers.attention.value.kernel": "none",
        TABLE: "none",
    }


@pytest.mark.parametrize(
    "written, others",
    [
        (("k_proj=int8", "v_proj=int8"), ["k_proj=int8", "q_proj=none"]),
        (("v_proj , k_proj = int8",), ["k_proj=int8"]),
        (("v_proj=int8", "k_proj=int8"), ["v_proj=int8", "k_proj=int4"]),
        (("v_proj=none", "k_proj=int8", "v_proj=int8"), ["k_proj=int8", "v_proj=none"]),
    ],
    ids=["as it is", "a list and spaces", "another order", "one that is replaced"],
)
def test_what_means_the_same_has_one_form(written, others):
    plain = ("k_proj=int8", "v_proj=int8")
    assert forms(*written) == forms(*plain) != forms(*others)
    named = [ModelConfig(quantize="nf4", quantize_paths=x).frozen_form
             for x in (written, plain, tuple(others))]  # fmt: skip
    assert named[0] == named[1] == "nf4 (k_proj=int8, v_proj=int8)" != named[2]


def test_the_order_of_different_formats_counts():
    found = [("mlp=int8", "down_proj=none"), ("down_proj=none", "mlp=int8")]
    assert forms(*found[0]) != forms(*found[1])
    assert [normalised(x) for x in found] == found


def test_an_entry_that_a_later_one_replaces_need_not_suit():
    assert forms("table=nf4", "table=none")[TABLE] == "none"


def test_a_scale_for_16_inputs_is_a_format_of_one_matrix():
    plain, other = (frozen(*x)[KEY].scales for x in ((), ("key=nf4_16",)))
    assert math.prod(other.shape) == 4 * math.prod(plain.shape)


@pytest.mark.parametrize(
    "override, said",
    [
        (
            "down_proj",
            "not 'pattern=format' with one of none, int8, int4, int4_32,",
        ),
        ("down_proj=q4_k", "'down_proj=q4_k' is not 'pattern=format'"),
        ("down_proj=keep", "'down_proj=keep' is not 'pattern=format'"),
        ("=int8", "'=int8' is not 'pattern=format'"),
        ("doun_proj=int8", "did you mean 'down_proj'"),
        ("norm=int8", "pattern 'norm' matches no parameter"),
        ("table=nf4", "nf4 would hold embedding.table in int8, as it holds all"),
    ],
)
def test_a_bad_override_is_refused_by_name(override, said):
    with pytest.raises(UserError, match=said):
        frozen(override)


def test_what_trains_whole_is_in_no_codes():
    assert isinstance(frozen(full=("embeddings",))[TABLE], Spec)
    with pytest.raises(UserError, match="pattern 'table' matches no parameter"):
        frozen("table=int8", full=("embeddings",))


@pytest.mark.parametrize("quantize", ["none", "keep"])
def test_codes_that_are_not_made_here_have_no_overrides(quantize):
    knobs = {"model.quantize": quantize, "model.quantize_paths": ("mlp=int8",)}
    with pytest.raises(UserError, match="of a base that is rounded: set"):
        changed(Config(), knobs, "knobs")


def test_a_fingerprint_keeps_the_spelling_that_a_run_was_saved_with():
    paths = ("v_proj=int8", "k_proj=int8")
    model = ModelConfig(quantize="nf4", quantize_paths=paths)
    assert base_of_run.as_written(model) == "nf4 (v_proj=int8, k_proj=int8)"
    assert model.frozen_form == "nf4 (k_proj=int8, v_proj=int8)"
