"""Peak host memory of loading and exporting a sharded model, beside its size.

    python tests/bench/host_memory.py [layers=16] [width=2048]

Writes a random model in bfloat16 with the proportions of an 8B Llama (embeddings and
head take 6 % of it each; with a width of 4096 its layers and vocabulary are those of
Llama 3 8B) in several files, loads it over eight virtual devices, whose
memory is the host's, exports it in bfloat16, and reads the export back for the proof.
Each peak is the highest resident size of the process (`VmHWM`) less that before the
model. The files are written by a process of their own, and freed memory returns to the
system at once, so that only what is in use counts. Needs twice the size of the model on
the disk below TMPDIR.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from research.config.knob_groups import MeshConfig
from research.formats.base_model import Base
from research.formats.export_format import ExportedModel, ExportOptions
from research.formats.huggingface import huggingface_export
from research.formats.huggingface.huggingface_weights import HuggingFaceWeights
from research.formats.load_parameters import load_base
from research.formats.proof.logit_parity import prove
from research.formats.proof.proof_tokens import ProofRows
from research.models.architecture import Architecture
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.tokenize.tokenizer_training import byte_tokenizer

GB = 1e9
FREEING = "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"


def shape(layers: int, width: int) -> Architecture:
    """A Llama 3 8B, at half the width with a smaller vocabulary."""
    vocab, mlp = {2048: (32768, 8192), 4096: (128256, 14336)}[width]
    return Architecture(
        vocab=vocab, embed=width, mlp=mlp, layers=layers, heads=width // 128,
        kv_heads=width // 512, head_dim=128, tied_head=False,
    )  # fmt: skip


def write_model(folder: Path, layers: int, width: int) -> None:
    """Random files, in the order of the layers, a tensor at a time."""
    huggingface_export.FILE_BYTES = 500_000_000
    model = Model(shape(layers, width))
    rng = np.random.default_rng(0)
    block = rng.normal(size=1 << 20).astype(np.float32)

    def draw(leaf: object, index: tuple[int, ...]) -> np.ndarray:
        size = leaf.shape[len(index) :]
        values = np.resize(np.roll(block, int(rng.integers(1 << 20))), size)
        std = leaf.std if leaf.n_in else 0.1
        return (values * std + (not leaf.n_in)).astype(ml_dtypes.bfloat16)

    huggingface_export.fetch = draw
    huggingface_export.export(model, model.specs, byte_tokenizer(), folder, "bfloat16")


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_of(name: str, size: int, before: int, work):
    """Runs `work`, and prints the peak of resident memory during it."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins at what is in use.
    result = work()
    peak = status("VmHWM:") - before
    print(
        f"{name}: peak {peak / GB:.2f} GB, {peak / size:.3f} of the model", flush=True
    )
    return result


def main() -> None:
    if os.environ.get("GLIBC_TUNABLES") != FREEING:  # Read at the start of a process.
        os.environ["GLIBC_TUNABLES"] = FREEING
        os.execv(sys.executable, [sys.executable, *sys.argv])
    given = [int(x) for x in sys.argv[1:]]
    layers, width = [*given, *(16, 2048)[len(given) :]]
    huggingface_export.FILE_BYTES = 500_000_000
    top = Path(tempfile.mkdtemp(prefix="host-memory-"))
    try:
        model = Model(shape(layers, width))
        writing = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(top / "in", layers, width)
        )
        writing.start()
        writing.join()
        files = [*(top / "in").glob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        print(f"{size / GB:.2f} GB in {len(files)} files, 8 virtual devices")
        mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        tokenizer = byte_tokenizer()
        tensors = HuggingFaceWeights(top / "in")
        base = Base("random", model.architecture, tokenizer, tensors)
        jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(8)))
        before = status("VmRSS:")
        params = peak_of(
            "load", size, before,
            lambda: load_base(base, model, mesh, jnp.bfloat16, 0),
        )  # fmt: skip
        exported, out = ExportedModel(model, params, tokenizer), top / "out"
        out.mkdir()
        options = ExportOptions("bfloat16")
        peak_of(
            "export", size, before,
            lambda: huggingface_export.FORMAT.write(exported, out, options),
        )  # fmt: skip
        tokens = np.arange(64, dtype=np.int32)[None] + 300
        rows = ProofRows(tokens, tokens - 300, np.ones_like(tokens), "64 ids")
        parity = peak_of(
            "proof", size, before,
            lambda: prove(
                exported,
                huggingface_export.FORMAT.read_back(out, exported),
                rows,
                "bfloat16",
            ),
        )  # fmt: skip
        print(parity.sentence())
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main()
