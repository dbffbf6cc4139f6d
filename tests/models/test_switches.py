"""Every family computes what Hugging Face's implementation computes.

`golden/switches.py` recorded tiny models that use each switch of a family. One program
a model shows parity and packing at once: its rows lie behind each other in one row. A
second one decodes through the cache.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from seeded_weights import make_weights

from research.formats.huggingface_weights import HuggingFaceWeights, read_hf_config
from research.formats.load_parameters import load_params
from research.models.families.family_registry import (
    family_of,
    from_hf_config,
    to_hf_config,
)
from research.models.families.stored_tensor import used
from research.models.transformer import Model

SWITCHES = Path(__file__).parents[1] / "golden" / "switches"
NAMES = sorted(path.name for path in SWITCHES.iterdir())


class Golden:
    """One recorded model: its folder with weights, its parameters, and outputs."""

    def __init__(self, name, folder):
        folder.mkdir()
        recorded = SWITCHES / name
        facts = json.loads((recorded / "tensors.json").read_text())
        weights = make_weights(facts["shapes"], facts["seed"], facts["norm_mean"])
        save_file(weights, folder / "model.safetensors")
        self.config = json.loads((recorded / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(self.config))
        self.folder, self.expected = folder, np.load(recorded / "expected.npz")
        self.architecture = read_hf_config(folder)
        self.model = Model(self.architecture)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = dict.fromkeys(self.model.specs, here)
        self.params = load_params(
            HuggingFaceWeights(folder), self.model, shardings, np.float32
        )


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("switches"), {}

    def make(name):
        if name not in made:
            made[name] = Golden(name, root / name)
        return made[name]

    return make


def packed(rows):
    """Rows behind each other in one: ids, positions and segments `[1, T]`."""
    positions = [np.arange(len(row)) for row in rows]
    segments = [np.full(len(row), n + 1) for n, row in enumerate(rows)]
    return [
        np.concatenate(x)[None].astype(np.int32) for x in (rows, positions, segments)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_match_hugging_face(golden, name):
    """Logits of single rows; and each greedy token is the likeliest one."""
    it = golden(name)
    tokens, recorded = it.expected["tokens"], it.expected["logits"]
    prompt, greedy = it.expected["prompt"][0], it.expected["greedy"][0]
    rows = [*tokens, np.concatenate([prompt, greedy])]
    model = it.model

    @jax.jit
    def logits(params, *row):
        return model.logits(params, model.hidden(params, *row))

    found = np.array(logits(it.params, *packed(rows)))[0]
    first, second, said = np.split(found, np.cumsum([len(row) for row in rows])[:-1])
    every = tokens.shape[1] // recorded.shape[1]
    ours = np.stack([first, second])[:, every - 1 :: every]
    difference = np.abs(ours - recorded).max()
    assert difference < 1e-3, f"{name}: logits differ by {difference:.2e}"
    likeliest = said[len(prompt) - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(likeliest, greedy)


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
