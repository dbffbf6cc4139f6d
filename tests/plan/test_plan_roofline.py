"""Seconds, FLOPs and MFU of plans, against what is known of them."""

import dataclasses
import types

import numpy as np
import pytest
from plan_helpers import EIGHT_B, big_config

from research.models.architecture import Architecture
from research.parallel import chips
from research.parallel import mesh as meshes
from research.plan import abstract_step
from research.plan.estimate import roofline
from research.plan.estimate.memory_formulas import kept_per_token
from research.plan.estimate.step_flops import StepFlops, count_step_flops
from research.plan.planned_devices import parse_device
from research.plan.step_costs import Collective
from research.train.metrics import throughput

LLAMA2_70B = Architecture(32000, 8192, 28672, 80, 64, 8, 128, tied_head=False)
LLAMA31_70B = dataclasses.replace(LLAMA2_70B, vocab=128256)


@pytest.mark.parametrize(
    ("shape", "chip", "length", "tokens_per_second", "published"),
    [
        (EIGHT_B, "v6e", 8192, 7207, 0.4546),
        (LLAMA31_70B, "v6e", 8192, 960, 0.5033),
        (LLAMA2_70B, "v5p", 4096, 692, 0.654),
    ],
    ids=["8B v6e-256", "70B v6e-256", "70B v5p-512"],
)
def test_mfu_of_published_speeds(shape, chip, length, tokens_per_second, published):
    """MaxText's tokens/s on a chip and MFU, of the tables in
    https://maxtext.readthedocs.io/en/maxtext-v0.2.0/reference/models/tiering.html.

    They count attention over the whole square of a row, masked half included; we count
    what is needed, so our own MFU is lower, the more so the longer the row.
    """
    count = throughput.count_flops(shape, trained=0, full=True)
    peak = chips.CHIPS[chip].flops
    theirs = count.step(1, 1, length) * tokens_per_second / peak
    ours = count.step(1, 1, (length + 1) / 2) * tokens_per_second / peak
    assert theirs == pytest.approx(published, rel=0.06)
    assert 0.88 * theirs < ours < theirs


def test_a_window_leaves_fewer_pairs():
    """Counted one by one: a query sees itself and those before it in its window."""
    windowed = dataclasses.replace(EIGHT_B, window=100, window_layers=(0, 2, 4, 6))
    seen = sum(min(i + 1, 100) for i in range(1000))
    share = seen / (1000 * 1001 / 2)
    expected = (4 * share + EIGHT_B.layers - 4) / EIGHT_B.layers
    assert windowed.seen_share(1000) == pytest.approx(expected)
    assert windowed.seen_share(100) == EIGHT_B.seen_share(1000) == 1.0
    assert windowed.seen_share(50) == 1.0

    def flops(shape):
        config = big_config("full", remat="none")
        mesh = meshes.make_mesh(config.mesh, parse_device("h100:8").devices())
        return count_step_flops(abstract_step.make_abstract_step(config, shape, mesh))

    all_pairs = throughput.count_flops(EIGHT_B, trained=0, full=True).per_pair
    all_pairs *= 64 * 2048 * 2049 / 2
    less = flops(EIGHT_B).model - flops(windowed).model
    assert less == pytest.approx(all_pairs * (1 - windowed.seen_share(2048)))


def test_flops_of_a_step_and_what_remat_repeats():
    """Against the textbook: 6P a token, 2P of them again; LoRA 4P, and again 2P."""

    def flops(kind, remat):
        target = parse_device("h100:8")
        config = big_config(kind, remat=remat)
        mesh = meshes.make_mesh(config.mesh, target.devices())
        return count_step_flops(abstract_step.make_abstract_step(config, EIGHT_B, mesh))

    tokens, pairs = 64 * 2048, 64 * 2048 * 2049 / 2
    layers = EIGHT_B.layers * EIGHT_B.matrices_per_layer
    head = EIGHT_B.vocab * EIGHT_B.embed
    scores = 2 * EIGHT_B.layers * EIGHT_B.embed * pairs  # One product of the two.
    full = flops("full", "full")
    assert full.model == 6 * (layers + head) * tokens + 6 * scores
    assert full.recomputed == pytest.approx(2 * layers * tokens + 3 * scores)
    assert flops("full", "none").recomputed == pytest.approx(scores)
    assert flops("full", "dots").recomputed == pytest.approx(3 * scores)
    lora, adapters = flops("lora", "full"), 41_943_040
    assert lora.model == (4 * (layers + head) + 6 * adapters) * tokens + 6 * scores
    again = 2 * (layers + adapters) * tokens + 3 * scores
    assert lora.recomputed == pytest.approx(again)


@pytest.mark.parametrize("remat, passes", [("none", 2), ("dots", 2), ("full", 3)])
def test_products_of_bytes_have_the_peak_of_bytes(remat, passes):
    """Forward and back through the layers' int8 matrices; `down` is in bfloat16."""

    def flops(**knobs):
        config = big_config("lora", remat=remat)
        model = dataclasses.replace(config.model, **knobs)
        config = dataclasses.replace(config, model=model)
        target = parse_device("h100:8")
        mesh = meshes.make_mesh(config.mesh, target.devices())
        step = abstract_step.make_abstract_step(config, EIGHT_B, mesh)
        return count_step_flops(step)

    paths = ("down_proj=none",)
    plain = flops(quantize="int8", quantize_paths=paths)
    found = flops(quantize="int8", quantize_paths=paths, int8_products=True)
    assert plain.in_bytes == 0 and found.total == plain.total
    a = EIGHT_B
    weights = a.layers * (a.matrices_per_layer - a.embed * a.mlp)
    assert found.in_bytes == 2 * passes * weights * 64 * 2048
    slow = found.total - found.in_bytes
    for name, devices, peaks in (
        ("h100:8", 8, (989e12, 1979e12)),
        ("v5e:4x4", 16, (197e12, 394e12)),
        ("v4:2x2x1", 4, (275e12, 275e12)),  # Its speed with bytes is not known.
    ):
        target = parse_device(name)
        seconds = (slow / peaks[0] + found.in_bytes / peaks[1]) / devices
        line = roofline.make_roofline(found, 0.0, [], target, mesh_of(target))
        assert line.compute == pytest.approx(seconds)
        busiest = roofline.predict(seconds, found, 1, None, target)
        assert busiest.mfu == pytest.approx(found.model / found.total)
        before = roofline.make_roofline(plain, 0.0, [], target, mesh_of(target))
        assert before.compute == pytest.approx(plain.total / peaks[0] / devices)


def gather(*members, nbytes=1600, times=1.0, kind="all-gather"):
    return Collective(kind, ("x",), nbytes, times, members)


def mesh_of(target):
    devices = target.devices()
    return types.SimpleNamespace(devices=types.SimpleNamespace(flat=devices))


@pytest.mark.parametrize(
    ("where", "collective", "ici", "dcn"),
    [
        # 15 of 16 parts arrive: on a ring from both sides, on a line from one.
        ("v5e:16x16", gather(*range(16)), 1500 / 9e10, 0),
        ("v5e:4x4", gather(*range(4)), 1200 / 4.5e10, 0),
        # Along both axes of the line, and every second device of a ring of 16.
        ("v5e:4x4", gather(*range(16)), 1500 / 9e10, 0),
        ("v5e:16x16", gather(*range(0, 16, 2)), 1400 / 4.5e10, 0),
        # All three axes of a cube close.
        ("v5p:4x4x4", gather(*range(64)), 1575 / 5.4e11, 0),
        ("v5e:16x16", gather(*range(16), kind="all-reduce"), 3000 / 9e10, 0),
        ("v5e:16x16", gather(*range(16), kind="all-to-all"), 6400 / 9e10, 0),
        ("v5p:4x4x4", gather(*range(64), kind="all-to-all"), 4800 / 5.4e11, 0),
        ("h100:8", gather(*range(8), kind="all-to-all"), 1400 / 4.5e11, 0),
        ("v5e:4x4", gather(0, 1, kind="collective-permute"), 1600 / 4.5e10, 0),
        # Eight a host: within one, and over two, where each sends its share.
        ("h100:16", gather(*range(8)), 1400 / 4.5e11, 0),
        ("h100:16", gather(*range(16)), 1400 / 4.5e11, 100 / 5e10),
        ("2 v5e:4x4", gather(0, 16, kind="all-reduce"), 0, 1600 / 3.125e9),
        ("v5e:4x4", gather(*range(4), times=7), 7 * 1200 / 4.5e10, 0),
    ],
)
def test_seconds_of_one_collective(where, collective, ici, dcn):
    slices, _, name = where.rpartition(" ")
    target = parse_device(name, int(slices or 1))
    line = roofline.make_roofline(
        StepFlops(0, 0), 0, [collective], target, mesh_of(target)
    )
    assert (line.ici, line.dcn) == (pytest.approx(ici), pytest.approx(dcn))


def test_roofline_and_prediction():
    target = parse_device("v5e:4x4")
    flops = StepFlops(model=3 * 16 * 1.97e14, recomputed=1 * 16 * 1.97e14)
    line = roofline.make_roofline(flops, 8.19e11, [], target, mesh_of(target))
    assert (line.compute, line.hbm) == (pytest.approx(4), pytest.approx(1))
    assert (line.overlapped, line.summed) == (pytest.approx(4), pytest.approx(5))
    assert line.bound_by == "compute"
    told = roofline.predict(line.overlapped, flops, 1000, 86_400, target)
    # Recomputation is not useful work: MFU counts 3 of the 4 seconds.
    assert told.mfu == pytest.approx(0.75)
    assert told.tokens_per_second == pytest.approx(250)
    assert told.days == pytest.approx(4)
    assert told.chip_hours == pytest.approx(4 * 24 * 16)
    epochs = roofline.predict(line.overlapped, flops, 1000, None, target)
    assert epochs == dataclasses.replace(told, days=None, chip_hours=None)


def test_an_mlp_without_a_gate_keeps_one_product_and_no_gate():
    """GPT-2 and GPT-NeoX: up and its activation, where others have gate and up."""
    mesh = types.SimpleNamespace(
        shape={"tensor": 2, "expert": 1},
        devices=np.array([types.SimpleNamespace(platform="cpu")]),
    )

    def kept(remat, gated):
        shape = dataclasses.replace(EIGHT_B, gated_mlp=gated)
        definition = types.SimpleNamespace(mesh=mesh)
        step = types.SimpleNamespace(architecture=shape, definition=definition)
        return kept_per_token(step, remat)

    for remat in ("dots", "none"):
        assert kept(remat, gated=True) - kept(remat, gated=False) == EIGHT_B.mlp / 2
    assert kept("full", gated=True) == kept("full", gated=False) == EIGHT_B.embed
