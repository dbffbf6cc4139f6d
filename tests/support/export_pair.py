"""One of two processes that export a model over the devices of both.

    python tests/support/export_pair.py NUMBER PORT FOLDER

Writes FOLDER/FORMAT in every format, and prints how each compares with the model.
"""

import os
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}

import jax
import numpy as np
import tiny_model
from helpers import mesh_sizes, random_adapters, random_params

from research.config.choices import EXPORT_FORMATS
from research.config.knob_groups import LoRAConfig, ModelConfig
from research.formats.base_model import open_base
from research.formats.export_folder import ExportFolder
from research.formats.export_format import (
    ExportedAdapter,
    ExportedModel,
    ExportOptions,
    find_format,
)
from research.formats.proof.logit_parity import prove
from research.formats.proof.proof_tokens import ProofRows
from research.models.transformer import Model
from research.parallel import agreement
from research.parallel import mesh as meshes
from research.weights import trainable

LORA = LoRAConfig(rank=4, alpha=8.0)


def place(values, specs, mesh):
    """Arrays over the devices of all processes."""
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(
            x.shape, where, np.asarray(x).__getitem__
        ),
        values,
        meshes.shardings(specs, mesh),
    )


def make_model(folder, mesh):
    """The tiny model with adapters on it, as if trained for a while."""
    base = open_base(str(folder))
    model = Model(base.architecture)
    split = trainable.make("lora", ModelConfig(), LORA, model.specs)
    factors = place(random_adapters(split.specs), split.specs, mesh)
    frozen = place(random_params(model.specs), model.specs, mesh)
    adapters = {
        path: ExportedAdapter(pair, LORA.rank, LORA.alpha)
        for path, pair in factors.items()
    }
    weights = split.forward(factors, frozen, None)
    facts = {"base_model": "tiny"}
    tokenizer = base.tokenizer
    return ExportedModel(
        model, weights, tokenizer, adapters, "lora", frozen, base, facts
    )


def main(number, port, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    mesh = meshes.make_mesh(mesh_sizes(1, 4, 2))

    def make_base():
        if jax.process_index() == 0:
            tiny_model.make_tiny_model(Path(folder, "base"))

    agreement.together(make_base)
    exported = make_model(Path(folder, "base"), mesh)
    tokens = np.arange(48, dtype=np.int32).reshape(2, 24) + 60
    places = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    rows = ProofRows(tokens, places, np.ones_like(tokens), "some ids")
    for name in EXPORT_FORMATS:
        format = find_format(name)
        out = ExportFolder.claimed(Path(folder, name))
        with out as claimed, claimed.filled() as partial:
            format.write(exported, partial, ExportOptions())
            agreement.together(lambda: None)
            written = format.read_back(partial, exported)
            parity = prove(exported, written, rows, "float32")
        print(name, parity.sentence(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
