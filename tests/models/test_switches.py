"""Every family computes what Hugging Face's implementation computes.

`golden/switches.py` recorded tiny models that use each switch of a family. One program
a model shows parity and packing at once: its rows lie behind each other in one row. A
second one decodes through the cache.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, in_soak, mesh_sizes, random_adapters
from jax.sharding import NamedSharding
from rounding_error import rounding_error
from safetensors.numpy import load_file, save_file
from switch_models import NAMES, SWITCHES, packed

from research.config.knob_groups import LoRAConfig
from research.formats.huggingface.huggingface_weights import HuggingFaceWeights
from research.formats.load_parameters import load_params
from research.models.attention_sharding import make_attend
from research.models.cached_attention import (
    cache_partition,
    constrain_cached,
    make_attend_cached,
)
from research.models.families.family_registry import (
    family_of,
    from_hf_config,
    to_hf_config,
)
from research.models.families.stored_tensor import used
from research.parallel.mesh import constrain, make_mesh, shardings
from research.weights.adapters.lora import adapt, adapter_specs, merge


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_match_hugging_face(golden, name):
    """Logits of single rows; and each greedy token is the likeliest one."""
    it = golden(name)
    recorded = it.expected["logits"]
    prompt, greedy = it.expected["prompt"][0], it.expected["greedy"][0]
    ours, said = it.logits(it.params)
    difference = np.abs(ours - recorded).max()
    assert difference < 1e-3, f"{name}: logits differ by {difference:.2e}"
    likeliest = said[len(prompt) - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(likeliest, greedy)


@pytest.mark.parametrize(
    "name", [name if name == "gemma2" else in_soak(name) for name in NAMES]
)
def test_bfloat16_rounds_no_more_than_in_hugging_face(golden, name):
    """With the same rounded weights. Norms in bfloat16 would show."""
    it = golden(name)
    rounded = {path: x.astype(jnp.bfloat16) for path, x in it.params.items()}
    exact, _ = it.logits({path: x.astype(jnp.float32) for path, x in rounded.items()})
    found, _ = it.logits(rounded, dtype=jnp.bfloat16)
    error = rounding_error(found, exact)
    print(f"{name}: {error:.5f}, in Hugging Face's {it.half_error:.5f}")
    assert 0 < error < 1.35 * it.half_error


def test_a_row_beyond_the_original_context_has_the_long_frequencies(golden):
    it = golden("phi3_longrope")
    row, model = it.expected["long"], it.model

    @jax.jit
    def logits(params, *row):
        return model.logits(params, model.hidden(params, *row)[:, -4:])

    found = logits(it.params, *packed(row))
    np.testing.assert_allclose(found, it.expected["long_logits"], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_through_the_cache_gives_the_greedy_tokens(golden, name):
    it = golden(name)
    prompt, greedy = it.expected["prompt"], it.expected["greedy"][0]
    model, count = it.model, len(greedy)

    @jax.jit
    def decode(params, prompt):
        def step(carry, forced):
            token, cache = carry
            token = jnp.where(forced < 0, token, forced)
            hidden, cache = model.decode(params, token[None, None], cache)
            best = jnp.argmax(model.logits(params, hidden[0, 0])).astype(jnp.int32)
            return (best, cache), best

        free = jnp.full(count - 1, -1, jnp.int32)
        forced = jnp.concatenate([prompt[0], free])
        start = jnp.int32(0), model.init_cache(1, len(forced))
        return jax.lax.scan(step, start, forced)[1]

    found = decode(it.params, prompt)[prompt.shape[1] - 1 :]
    np.testing.assert_array_equal(found, greedy)


@pytest.mark.parametrize("name", NAMES)
def test_its_files_are_written_back(golden, name):
    """The same tensors under the same names, and a config that is read alike."""
    it = golden(name)
    expected = load_file(it.folder / "model.safetensors")
    specs = it.model.specs
    values = {path: np.asarray(value) for path, value in it.params.items()}
    found = {}
    for stored in used(family_of(it.architecture).hf_tensors, specs):
        for tensor, index in stored.names(specs):
            parts = [values[path][index] for path in stored.paths]
            found[tensor] = stored.pack(parts, specs)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(found[tensor], value, err_msg=tensor)
    written = to_hf_config(it.architecture)
    assert from_hf_config(written) == it.architecture
    ours, theirs = read_by_transformers(written), read_by_transformers(it.config)
    assert within(theirs, ours) == ours


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_that_lie_in_one_tensor_are_read(golden, name, tmp_path):
    """As transformers 5 has them in memory, and as some files have them."""
    it = golden(name)
    written = used(family_of(it.architecture).other_hf_tensors[0], it.model.specs)
    tensors = {
        tensor: np.ascontiguousarray(
            stored.pack([np.asarray(it.params[p])[i] for p in stored.paths], specs)
        )
        for specs in [it.model.specs]
        for stored in written
        for tensor, i in stored.names(specs)
    }
    a = it.architecture
    fused = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert fused.shape == (a.experts.count, 2 * a.mlp, a.embed)
    gate = np.asarray(it.params["layers.mlp.gate.kernel"])[1, 2].T
    np.testing.assert_array_equal(fused[2, : a.mlp], gate)
    save_file(tensors, tmp_path / "model.safetensors")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where, files = dict.fromkeys(it.model.specs, here), HuggingFaceWeights(tmp_path)
    found = load_params(files, it.model, where, np.float32)
    for path, value in it.params.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.fixture(scope="module")
def split():
    """Rows, matrices, heads and tokens over eight devices."""
    return make_mesh(mesh_sizes(fsdp=2, tensor=2, context=2))


def placed(golden, mesh):
    specs = golden.model.specs
    return jax.device_put(golden.params, shardings(specs, mesh))


def test_a_mesh_computes_the_same(golden, split):
    """One norm over heads that are split; windows that end in another part of a row."""
    it = golden("olmo3")
    model = it.model.with_options(
        attend=make_attend(split, "xla", 8), constrain=constrain(split)
    )
    tokens = it.expected["tokens"]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def logits(params, tokens, positions):
        segments = jnp.ones_like(tokens)
        return model.logits(params, model.hidden(params, tokens, positions, segments))

    found = np.array(logits(placed(it, split), tokens, positions))
    every = found.shape[1] // it.expected["logits"].shape[1]
    found = found[:, every - 1 :: every]
    np.testing.assert_allclose(found, it.expected["logits"], atol=1e-3)


@pytest.mark.parametrize("first", [0, in_soak(1)])
def test_a_mesh_decodes_the_same(golden, split, first):
    """Both slots at once, or the second one alone, whose device keeps the result."""
    it, mesh = golden("gemma2"), split
    heads = it.architecture.kv_heads
    model = it.model.with_options(
        attend_cached=make_attend_cached(mesh, 2, heads),
        constrain_cached=constrain_cached(mesh, 2),
    )

    @jax.jit
    def logits(params, tokens, cache):
        hidden, _ = model.decode(params, tokens, cache, first)
        return model.logits(params, hidden)

    cache = model.init_cache(2, 128)
    where = NamedSharding(mesh, cache_partition(mesh, 2, heads))
    cache = dataclasses.replace(
        cache, **jax.device_put({"k": cache.k, "v": cache.v}, where)
    )
    found = np.array(logits(placed(it, mesh), it.expected["tokens"][first:], cache))
    every = found.shape[1] // it.expected["logits"].shape[1]
    expected = it.expected["logits"][first:]
    np.testing.assert_allclose(found[:, every - 1 :: every], expected, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_lora_reaches_every_matrix(golden, name):
    it = golden(name)
    specs = adapter_specs(it.model.specs, LoRAConfig(targets=(".",), rank=2))
    assert {*specs} == {path for path, spec in it.model.specs.items() if spec.n_in}
    # The modules that other tools know them by are those of the files.
    names = {name for spec in it.model.specs.values() for name in spec.names}
    recorded = json.loads((SWITCHES / name / "tensors.json").read_text())["shapes"]
    for tensor in recorded:
        module = re.sub(r"\.\d+(?=\.)", ".{}", re.sub(r"\.(weight|bias)$", "", tensor))
        assert module in names, module


def test_adapters_on_every_matrix_compute_what_merged_weights_do(golden):
    """With biases, a tied head, and a table of positions among the matrices."""
    it = golden("gpt2")
    config = LoRAConfig(targets=(".",), rank=2)
    adapters = random_adapters(adapter_specs(it.model.specs, config))
    tokens = it.expected["tokens"][:1]

    @jax.jit
    def logits(params):
        return it.model.logits(params, it.model.hidden(params, *packed(tokens)))

    together = logits(adapt(it.params, adapters, config))
    close(together, logits(merge(it.params, adapters, config)), rtol=1e-4)
    assert np.abs(together - logits(it.params)).max() > 0.1


# A run does not compute these: ids, dropout, initial values, and how the file was made.
UNRELATED = (
    "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "pad_token_id", "transformers_version", "use_cache", "max_window_layers",
)  # fmt: skip


def within(theirs, ours):
    """`ours` with the values of `theirs`: what a file implies may be written out."""
    if not isinstance(theirs, dict):
        return theirs
    return ours | {key: within(x, ours.get(key, {})) for key, x in theirs.items()}


def read_by_transformers(config):
    from transformers import AutoConfig

    fields = {k: v for k, v in config.items() if k != "model_type"}
    read = AutoConfig.for_model(config["model_type"], **fields).to_dict()
    return {k: v for k, v in read.items() if k not in UNRELATED and v is not None}
