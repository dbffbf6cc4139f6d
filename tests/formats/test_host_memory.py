"""The bytes that loading, exporting and a proof hold beside the model.

`tests/bench/host_memory.py` measures the same in the shape of an 8B model.
"""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params

from research.formats import tensor_file
from research.formats.export_format import ExportedModel, ExportOptions, find_format
from research.formats.gguf import gguf_file, gguf_writer
from research.formats.gguf.gguf_file import GGUFFile
from research.formats.huggingface import huggingface_weights, safetensors_writer
from research.formats.huggingface.huggingface_weights import HuggingFaceWeights
from research.formats.load_parameters import load_params
from research.formats.proof import logit_parity
from research.formats.proof.logit_parity import prove
from research.formats.proof.proof_tokens import ProofRows
from research.models.architecture import Architecture
from research.models.transformer import Model
from research.tokenize.tokenizer_training import byte_tokenizer

# The embeddings and the head are most of the model, and a layer is a third of an end.
SHAPE = Architecture(
    vocab=512, embed=2048, mlp=32, layers=2, heads=2, kv_heads=1, head_dim=16,
    tied_head=False,
)  # fmt: skip
END = 2 * 512 * 2048  # Bytes of an end in bfloat16.
BF16 = jnp.dtype(jnp.bfloat16)


@pytest.fixture
def exported(monkeypatch):
    """A model in bfloat16, whose tensors are read and written in small pieces."""
    for module in (gguf_file, gguf_writer, huggingface_weights, tensor_file):
        monkeypatch.setattr(module, "PIECE", 2**14)
    monkeypatch.setattr(safetensors_writer, "PIECE_BYTES", 2**15)
    monkeypatch.setattr(logit_parity, "PIECE", 2**16)
    model = Model(SHAPE)
    params = random_params(model.specs)
    params = {path: value.astype(BF16) for path, value in params.items()}
    return ExportedModel(model, params, byte_tokenizer())


def peak_of(work):
    """The most bytes that NumPy and Python held at once while `work` was done again."""
    work()  # Programs and modules are there from now on.
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def counted(read, seen):
    """`read` that notes how many bytes of arrays JAX has when it is called."""

    def counting(*arguments):
        seen.append(sum(x.nbytes for x in jax.live_arrays()))
        return read(*arguments)

    return counting


@pytest.mark.parametrize("name", ["hf", "gguf"])
def test_little_is_in_memory_beside_the_model(tmp_path, exported, name):
    """A file is written and loaded a tensor at a time, and compared in pieces."""
    format, options = find_format(name), ExportOptions("bfloat16")
    peak = peak_of(lambda: format.write(exported, tmp_path, options))
    assert END < peak < 1.3 * END

    opens = {
        "hf": lambda: HuggingFaceWeights(tmp_path),
        "gguf": lambda: GGUFFile(tmp_path / "model.gguf"),
    }
    model, tensors = exported.model, opens[name]()
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(model.specs, where)
    peak = peak_of(lambda: load_params(tensors, model, shardings, BF16))
    # JAX may use the memory of NumPy's arrays for its own, and may not.
    size = sum(x.nbytes for x in exported.weights.values())
    assert END < peak < size + 1.3 * END

    written = format.read_back(tmp_path, exported)
    seen: list[int] = []
    read, read_rows = (counted(x, seen) for x in (written.read, written.read_rows))
    written = dataclasses.replace(written, read=read, read_rows=read_rows)
    tokens = np.arange(16, dtype=np.int32)[None]
    rows = ProofRows(tokens, tokens, np.ones_like(tokens), "16 ids")
    before = sum(x.nbytes for x in jax.live_arrays())
    peak = peak_of(lambda: prove(exported, written, rows, "bfloat16"))
    assert peak + max(seen) - before < END
