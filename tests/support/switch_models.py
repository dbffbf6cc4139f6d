"""The tiny models of `golden/switches`, which use each switch of a family."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from seeded_weights import make_weights

from research.formats.huggingface.huggingface_weights import (
    HuggingFaceWeights,
    read_hf_config,
)
from research.formats.load_parameters import load_params
from research.models.transformer import Model

SWITCHES = Path(__file__).parents[1] / "golden" / "switches"
NAMES = sorted(path.name for path in SWITCHES.iterdir())


class SwitchModel:
    """One recorded model: its folder with weights, its parameters, and outputs."""

    def __init__(self, name, folder):
        folder.mkdir()
        self.name = name
        recorded = SWITCHES / name
        facts = json.loads((recorded / "tensors.json").read_text())
        weights = make_weights(facts["shapes"], facts["seed"], facts["norm_mean"])
        file = folder / "model.safetensors"
        save_file(weights, file, metadata={"format": "pt"})
        self.config = json.loads((recorded / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(self.config))
        self.half_error = facts["half_error"]
        self.folder, self.expected = folder, np.load(recorded / "expected.npz")
        self.architecture = read_hf_config(folder)
        self.model = Model(self.architecture)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = dict.fromkeys(self.model.specs, here)
        self.params = load_params(
            HuggingFaceWeights(folder), self.model, shardings, np.float32
        )
        self._logits = make_logits(self.model)

    def logits(self, params, **options):
        """Logits at the positions that are recorded, and those of the greedy row.

        Also computed behind each other in one row, so that one program has all.
        """
        tokens, every = self.expected["tokens"], 6
        prompt, greedy = self.expected["prompt"][0], self.expected["greedy"][0]
        rows = [*tokens, np.concatenate([prompt, greedy])]
        logits = self._logits
        if options:
            logits = make_logits(self.model.with_options(**options))
        found = np.array(logits(params, *packed(rows)))[0]
        ends = np.cumsum([len(row) for row in rows])[:-1]
        first, second, said = np.split(found, ends)
        return np.stack([first, second])[:, every - 1 :: every], said


def make_logits(model):
    return jax.jit(
        lambda params, *row: model.logits(params, model.hidden(params, *row))
    )


def packed(rows):
    """Rows behind each other in one: ids, positions and segments `[1, T]`."""
    positions = [np.arange(len(row)) for row in rows]
    segments = [np.full(len(row), n + 1) for n, row in enumerate(rows)]
    return [
        np.concatenate(x)[None].astype(np.int32) for x in (rows, positions, segments)
    ]


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """Opens a tiny model by its name, once."""
    root, made = tmp_path_factory.mktemp("switches"), {}

    def make(name):
        if name not in made:
            made[name] = SwitchModel(name, root / name)
        return made[name]

    return make
