"""Peak host memory of loading and exporting a sharded model, beside its size.

    python tests/bench/host_memory.py [--scale=2] [--formats=hf,gguf]

Writes a random model in bfloat16 in several files, loads it over eight virtual devices,
whose memory is the host's, and exports it in bfloat16 in each format. The files of an
export are read back and compared with the model, as `research.export` does. The model
is a Llama 3 8B with all its 32 layers, where the width, the MLP and the vocabulary are
divided by `--scale`: so each layer and each end of it is the same share of the model
as in the 8B, 2.7 % and 6.5 %. It takes 16 GB divided by the square of the scale, and
twice that on the disk below TMPDIR.

Each peak is the highest resident size of the process (`VmHWM`) less that before the
model. The files are written by a process of their own, and freed memory returns to the
system at once, so that only what is in use counts.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from research.config.knob_groups import MeshConfig
from research.formats.base_model import Base, open_base
from research.formats.export_format import ExportedModel, ExportOptions, find_format
from research.formats.huggingface import huggingface_export
from research.formats.load_parameters import load_base
from research.formats.proof.logit_parity import prove
from research.formats.proof.proof_tokens import ProofRows
from research.models.architecture import Architecture
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.tokenize.tokenizer_training import byte_tokenizer

GB = 1e9
FREEING = "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"
FILES = 8


def shape(scale: int) -> Architecture:
    """Llama 3 8B, divided in its width."""
    return Architecture(
        vocab=128256 // scale, embed=4096 // scale, mlp=14336 // scale, layers=32,
        heads=32 // scale, kv_heads=8 // scale, head_dim=128, tied_head=False,
    )  # fmt: skip


def write_model(folder: Path, scale: int) -> None:
    """Random files, in the order of the layers, a tensor at a time."""
    model = Model(shape(scale))
    numbers = sum(np.prod(x.shape) for x in model.specs.values())
    huggingface_export.FILE_BYTES = int(2 * numbers / FILES)
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
    """Bytes of a field of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Measured:
    """Peaks of work, beside the size of the model."""

    def __init__(self, size: int):
        self._size, self._before = size, status("VmRSS:")

    def peak_of(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs `work`, and prints the peak of resident memory during it."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins at what is in use.
        result = work()
        peak = status("VmHWM:") - self._before
        share = peak / self._size
        print(f"{name}: peak {peak / GB:.2f} GB, {share:.3f} of the model", flush=True)
        return result


def measure(top: Path, size: int, scale: int, formats: list[str]) -> None:
    """Loads the model in `top`, and exports it in each format."""
    model = Model(shape(scale))
    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    opened = open_base(str(top / "in"))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(8)))
    measured = Measured(size)

    def load(base: Base) -> dict[str, Any]:
        return load_base(base, model, mesh, jnp.bfloat16, 0)

    exported = ExportedModel(
        model, measured.peak_of("load", lambda: load(opened)), opened.tokenizer
    )
    for name in formats:
        export_as(name, exported, top / name, measured)
        shutil.rmtree(top / name)


def export_as(
    name: str, exported: ExportedModel, out: Path, measured: Measured
) -> None:
    """Writes one format into `out`, and proves it."""
    format, options = find_format(name), ExportOptions("bfloat16")
    tokens = np.arange(64, dtype=np.int32)[None] + 300
    rows = ProofRows(tokens, tokens - 300, np.ones_like(tokens), "64 ids")
    out.mkdir()
    measured.peak_of(f"export as {name}", lambda: format.write(exported, out, options))
    parity = measured.peak_of(
        f"proof of {name}",
        lambda: prove(exported, format.read_back(out, exported), rows, "bfloat16"),
    )
    print(parity.sentence(), flush=True)


def main() -> None:
    if os.environ.get("GLIBC_TUNABLES") != FREEING:  # Read at the start of a process.
        os.environ["GLIBC_TUNABLES"] = FREEING
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=int, default=2, choices=(1, 2, 4, 8))
    parser.add_argument("--formats", default="hf,gguf")
    asked = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix="host-memory-"))
    try:
        writing = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(top / "in", asked.scale)
        )
        writing.start()
        writing.join()
        files = [*(top / "in").glob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        print(f"{size / GB:.2f} GB in {len(files)} files, 8 virtual devices")
        measure(top, size, asked.scale, asked.formats.split(","))
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main()
