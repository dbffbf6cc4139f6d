"""Kinds whose start needs more than weights: EVA reads rows, LoftQ the file again,
and QERA both.

They train on a 2x2x2 mesh; with them are VeRA, whose matrices all layers share, and
DoRA.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, in_soak
from small_run import (
    as_killed,
    make_small_place,
    one_device,
    small_config,
    small_hidden,
)

from research.config.run_config import LoRAConfig
from research.core.errors import UserError
from research.formats.base_model import open_base
from research.formats.export_names import EXPORTED
from research.formats.load_parameters import load_base
from research.runs.answering.open_for_answering import open_for_answering
from research.runs.display_files import read_findings
from research.runs.metrics_file import read_metrics
from research.runs.reopen import reopen
from research.train import start_to_report
from research.weights.adapters import serving_bank
from research.weights.representations.adapter_bank import AdapterBank

STEPS, KILLED = 4, 2
FEW = ("attention.output", "mlp.down")
CODED = {kind: {"quantize": "nf4"} for kind in ("loftq", "qera")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    make_small_place(folder)
    return folder


def config_for(small, name, kind, **changes):
    own = {"eva_batches": 2} if kind in ("eva", "qera") else {}
    lora = LoRAConfig(kind=kind, rank=2, targets=FEW, **own)
    lora = dataclasses.replace(lora, **changes)
    return small_config(small, name, STEPS, CODED.get(kind, {}), lora=lora)


@pytest.fixture(
    scope="module", params=[*map(in_soak, ("eva", "vera", "loftq", "qera", "dora"))]
)
def trained(request, small):
    """The kind, and the folder of an unbroken run."""
    config = config_for(small, request.param, request.param)
    assert start_to_report.train([config]) == 0
    return request.param, Path(config.run_dir)


def test_the_doctor_proves_its_start_and_the_loss_falls(trained):
    kind, folder = trained
    found = {finding.name: finding for finding in read_findings(folder)}
    start = found[f"{kind} at step 0"]
    assert start.ok
    if kind in CODED:
        assert start.numbers["differing"] > 0
        assert "layers.attention.output.kernel from" in start.text
    elif kind != "dora":  # Two programs may round its lengths in two ways.
        assert start.numbers["differing"] == 0
    losses = [x["loss"] for x in read_metrics(folder) if x["kind"] == "train"]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    run = reopen(folder)
    for factors in run.trainable.adapters(run.params).values():
        changing = {"lambda_d", "lambda_b"} if kind == "vera" else {"a", "b"}
        assert changing <= factors.keys()
        if kind == "eva":  # Room for twice the rank; the rest is zero.
            assert factors["a"].shape[-1] == factors["b"].shape[1] == 4
    if kind == "eva":
        factors = run.trainable.adapters(run.params)
        ranks = [
            int(np.any(np.asarray(own["b"]).reshape(2, 4, -1)[layer], -1).sum())
            for own in factors.values()
            for layer in range(2)
        ]
        assert sum(ranks) == 2 * 2 * len(FEW), ranks


def test_a_killed_run_resumes_bit_for_bit(small, trained):
    kind, folder = trained
    name = f"{kind}-killed"
    as_killed(folder, KILLED, small / name)
    assert start_to_report.train([config_for(small, name, kind)]) == 0
    history = json.loads((small / name / "run.json").read_text())
    assert [start["first"] for start in history["starts"]] == [0, KILLED]
    runs = [reopen(place, step=str(STEPS)).params for place in (small / name, folder)]
    jax.tree.map(np.testing.assert_array_equal, *runs)


def test_it_is_exported_and_served_as_lora(trained):
    kind, folder = trained
    run = reopen(folder, one_device())
    adapted = small_hidden(run.model, run.weights)
    assert np.abs(adapted - small_hidden(run.model, run.frozen)).max() > 1e-3
    written = open_base(str(folder / EXPORTED))
    merged = load_base(written, run.model, run.mesh, jnp.float32, 0)
    close(small_hidden(run.model, merged), adapted, rtol=1e-4)
    if kind not in CODED:  # A server has the base of the file.
        found = open_for_answering([str(folder)], mesh=one_device())
        assert isinstance(found.params["layers.mlp.down.kernel"], AdapterBank)
        _, row = found.read(found.runs[0])
        params = serving_bank.set_row(found.params, 1, row)
        served = serving_bank.rows(params, np.int32([1, 0] * (len(adapted) // 2)))
        hidden = small_hidden(run.model, served)
        close(hidden[::2], adapted[::2], rtol=1e-4)
        close(hidden[1::2], small_hidden(run.model, run.frozen)[1::2], rtol=1e-4)


@pytest.mark.parametrize(
    "kind, changes, model, said",
    [
        ("loftq", {}, {}, "loftq and qera start at what the codes of a base have"),
        ("qera", {"targets": ("embedding",)}, CODED["qera"], "qera starts at the inp"),
        (
            "loftq",
            {},
            {"quantize": "nf4", "quantize_paths": ("layers=none",)},
            "loftq starts .* keeps each of its targets as an array: drop an entry",
        ),
        ("eva", {"rslora": True}, {}, "EVA gives each matrix a rank of its own"),
        ("vera", {"targets": ("embedding",)}, {}, "vera has none for tables: drop"),
        (
            "eva",
            {"targets": ("embedding",)},
            {},
            "eva starts at the inputs of layers: drop",
        ),
        (
            "eva",
            {"rank": 40},
            {},
            "rank x lora.eva_rho is 80, and .* only 64 dir.*: lo",
        ),
        (
            "loftq",
            {"rank": 65},
            {"quantize": "nf4"},
            r"rank is 65, and .*\[64, 64\].*: ",
        ),
        (
            "lora",
            {"rank": 65},
            {},
            r"kernel cannot .*\[64, 64\] has .* above 64: lower",
        ),
        (
            "dora",
            {"rank_pattern": ("down=65",)},
            {},
            r"mlp.down.kernel cannot .* 65, and",
        ),
        ("orthogonal", {"rank": 3}, {}, "rank is 3, and .* half of it: make it even"),
        ("lora", {"layers": "1-7"}, {}, "config.lora.layers has 1-7, and the layers"),
    ],
)
def test_what_cannot_be_is_one_sentence(small, kind, changes, model, said):
    with pytest.raises(UserError, match=said) as refused:
        lora = dataclasses.replace(LoRAConfig(kind=kind, targets=FEW), **changes)
        start_to_report.train([small_config(small, "bad", STEPS, model, lora=lora)])
    assert len(str(refused.value).splitlines()) == 1
    assert not (small / "bad").exists()
