"""Runs are opened to answer together: one base, and adapters that fit it."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import STEPS
from small_run import one_device
from tiny_model import make_tiny_model

from research.core.errors import DamagedError, UserError
from research.runs.aliases import promotions
from research.runs.answering.found_adapters import find_adapters
from research.runs.answering.int8_base import mean_loss, texts_to_measure
from research.runs.answering.named_model import open_named
from research.runs.answering.open_for_answering import open_for_answering
from research.runs.answering.run_addresses import RunAddress, run_addresses
from research.runs.reopen import reopen
from research.runs.run_directory import RunDir
from research.serve import model_reader
from research.tokenize.conversation import Turn
from research.weights.adapters import serving_bank
from research.weights.quantized.int8_weights import Int8Matrix
from research.weights.representations.transposed import Transposed


@pytest.fixture(scope="module")
def run(place, unbroken):
    """A finished run of adapters of rank 4, with several checkpoints."""
    assert unbroken.code == 0, unbroken.err
    return place.run_dir("unbroken")


@pytest.fixture(scope="module")
def opened(run):
    return open_for_answering([str(run)], mesh=one_device(), rank=1)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def with_row(opened, row, index=1):
    """The parameters of a batch of one row that uses `row`; `opened` stays usable."""
    params = jax.tree.map(jax.numpy.copy, opened.params)
    written = serving_bank.set_row(params, index, row)
    rows = serving_bank.rows(written, np.array([index]))

    def plain(x):  # A bank keeps the first factors with their outputs first.
        if not isinstance(x, Transposed):
            return x
        return jax.numpy.moveaxis(x.of, x.of.ndim > 2, -1)  # Layers stand before.

    return jax.tree.map(plain, rows, is_leaf=lambda x: isinstance(x, Transposed))


def test_a_run_is_read_onto_the_base_as_reopen_reads_it(run, opened):
    (address,) = opened.runs
    served, row = opened.read(address)
    whole = reopen(run, one_device())
    same(with_row(opened, row), whole.weights)
    assert (served.name, served.step, served.parent) == ("unbroken", STEPS, "base")
    assert served.root == str(run) and served.is_chat
    turns = [Turn("user", "Add 3 to 4")]
    assert served.prompts.encode_prompt(turns) == whole.prompts.encode_prompt(turns)
    assert not served.has_changed()


def test_an_adapter_is_known_by_its_content(run, opened, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved")
    (tmp_path / "model").symlink_to(run.parents[1] / "model")
    steps = sorted(int(x.name) for x in (run / "checkpoints").iterdir())
    written = (str(run), str(moved), f"{run}@{steps[0]}")
    found = [opened.read(x)[0] for x in run_addresses(written)]
    assert found[0].identity == found[1].identity != found[2].identity
    assert [x.name for x in found][2] == f"unbroken@{steps[0]}"
    assert found[2].step == steps[0]


def test_a_run_of_another_base_is_refused_before_it_is_read(run, opened, tmp_path):
    make_tiny_model(tmp_path / "other", seed=1)
    name = str(tmp_path / "other")
    hashes = (
        RunDir(run).identity()["base model"][:12],
        open_named(name).fingerprint[:12],
    )
    with pytest.raises(UserError) as raised:
        open_for_answering([str(run)], model=name)
    assert all(x in str(raised.value) for x in (str(run), name, *hashes))
    # Neither does one that is loaded later.
    moved = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(moved / "checkpoints" / str(STEPS) / "state")
    for part in ("base model", "tokenizer"):
        identity = RunDir(run).identity() | {part: "f" * 64}
        (moved / "identity.json").write_text(json.dumps(identity))
        with pytest.raises(UserError, match=f"{part} sha256 ffffffffffff.*serve the"):
            opened.read(run_addresses([str(moved)])[0])


@pytest.fixture(scope="module")
def over_codes(run, tmp_path_factory):
    """The run, and the same as if it had been trained over codes, by kind."""
    place, found = tmp_path_factory.mktemp("codes"), {"plain": str(run)}
    (place / "model").symlink_to(run.parents[1] / "model")
    for kind, quantize in (("lora", "nf4"), ("loftq", "nf4"), ("keep", "keep")):
        moved = shutil.copytree(run, place / kind)
        config = json.loads((run / "config.json").read_text())
        config["model"]["quantize"] = quantize
        config["lora"]["kind"] = "loftq" if kind == "loftq" else "lora"
        (moved / "config.json").write_text(json.dumps(config))
        found[kind] = str(moved)
    return found


@pytest.mark.parametrize(
    "first, second, said",
    [
        ("plain", "lora", "trained over nf4 codes and answers over the base model's"),
        ("lora", "plain", "over the base model's own weights and answers over nf4"),
        ("lora", "loftq", ""),
        ("plain", "keep", ""),
    ],
)
def test_a_run_over_another_form_of_the_base_is_served_with_a_warning(
    over_codes, caplog, first, second, said
):
    found = open_for_answering(
        [over_codes[first], over_codes[second]], mesh=one_device()
    )
    assert found.frozen_form == ("none" if first == "plain" else "nf4")
    for address in found.runs:
        found.read(address)
    warned = [line for line in caplog.messages if "its answers may differ" in line]
    assert len(warned) == bool(said)
    assert said in "".join(warned)


@pytest.mark.parametrize("others", [["plain"], ["keep"], []])
def test_a_run_of_loftq_is_refused_over_another_form_before_it_is_loaded(
    over_codes, others, monkeypatch
):
    for name in ("load_frozen", "load_base"):
        monkeypatch.delattr(f"research.runs.answering.open_for_answering.{name}")
    model = "" if others else str(Path(over_codes["loftq"]).parent / "model")
    with pytest.raises(UserError, match=r"what nf4 codes lack.*serve the run by its"):
        open_for_answering(
            [over_codes[x] for x in (*others, "loftq")], model=model, mesh=one_device()
        )


def test_the_newest_checkpoint_of_a_run_in_training_is_followed(run, opened, tmp_path):
    folder = shutil.copytree(run, tmp_path / "training")
    (tmp_path / "model").symlink_to(run.parents[1] / "model")
    steps = sorted(int(x.name) for x in (run / "checkpoints").iterdir())
    newest = folder / "checkpoints" / str(steps[-1])
    # As Orbax writes a checkpoint, before the rename that commits it.
    torn = newest.rename(newest.with_name(f"{steps[-1]}.orbax-checkpoint-tmp"))
    (address,) = run_addresses([str(folder)])
    served, _ = opened.read(address)
    assert served.step == steps[-2] and not served.has_changed()
    torn.rename(newest)
    assert served.has_changed()
    served, row = opened.read(address)
    assert served.step == steps[-1] and not served.has_changed()
    (fixed,) = run_addresses([f"{folder}@{steps[-2]}"])
    assert not opened.read(fixed)[0].has_changed()
    # Its trainer saves, and removes what it has while nobody looks.
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    assert not served.has_changed()
    same(with_row(opened, row), reopen(run, one_device()).weights)


def test_an_alias_answers_under_its_name_and_is_followed(run, opened, tmp_path):
    folder = shutil.copytree(run, tmp_path / "runs" / "one")
    (tmp_path / "model").symlink_to(run.parents[1] / "model")
    other = shutil.copytree(folder, tmp_path / "runs" / "two")
    steps = sorted(int(x.name) for x in (run / "checkpoints").iterdir())
    alias = tmp_path / "runs" / "prod"
    promotions.promote(alias, folder, str(steps[0]))
    (address,) = run_addresses([str(alias)])
    served, _ = opened.read(address)
    assert (served.name, served.step, served.root) == ("prod", steps[0], str(folder))
    assert not served.has_changed()
    promotions.promote(alias, other, "latest")
    assert served.has_changed()
    task = model_reader.reading(model_reader.ADAPTER, served.address.now())
    fields = json.loads(json.dumps(task["address"]))
    newer, _ = opened.read(RunAddress(**fields | {"folder": other}))
    assert (newer.name, newer.step, newer.root) == ("prod", steps[-1], str(other))
    assert not newer.has_changed()
    shutil.rmtree(other)
    assert not newer.has_changed(), "it answers with what it has"
    with pytest.raises(UserError, match="it is not there: promote another one"):
        run_addresses([str(alias)])
    with pytest.raises(UserError, match="an alias has one step"):
        run_addresses([f"{alias}@{steps[0]}"])


def test_a_damaged_checkpoint_is_passed_over_once(run, opened, tmp_path, caplog):
    folder = shutil.copytree(run, tmp_path / "damaged")
    (tmp_path / "model").symlink_to(run.parents[1] / "model")
    steps = sorted(int(x.name) for x in (run / "checkpoints").iterdir())
    for step in steps:
        (address,) = run_addresses([str(folder)])
        if step == steps[-1]:
            served, _ = opened.read(address)
            assert served.step == steps[-2] and "is opened instead" in caplog.text
            assert not served.has_changed(), "it would be read again and again"
        sums = folder / "checkpoints" / str(steps[-1]) / "sums.json"
        sums.write_text("{}")
    for step in steps[:-1]:
        (folder / "checkpoints" / str(step) / "sums.json").write_text("{}")
    with pytest.raises(DamagedError):
        opened.read(address)


def test_a_folder_of_runs_serves_all_that_have_a_checkpoint(run, tmp_path, caplog):
    for name in ("lr=1", "lr=2", "base"):
        shutil.copytree(run, tmp_path / "sweep" / name)
    empty = shutil.copytree(run, tmp_path / "sweep" / "lr=3")
    shutil.rmtree(empty / "checkpoints")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    found = run_addresses([str(tmp_path / "sweep")])
    assert [x.name for x in found] == ["sweep/base", "lr=1", "lr=2"]
    assert "not served: lr=3" in caplog.text
    # The same names elsewhere.
    shutil.copytree(run, tmp_path / "again" / "lr=1")
    written = [str(tmp_path / "sweep"), str(tmp_path / "again" / "lr=1")]
    names = [x.name for x in run_addresses(written)]
    assert names == ["sweep/base", "sweep/lr=1", "lr=2", "again/lr=1"]


def test_what_is_no_run_is_refused_in_one_sentence(run, tmp_path):
    waiting = shutil.copytree(run, tmp_path / "waiting")
    shutil.rmtree(waiting / "checkpoints")
    refused = {
        str(run.with_name("unbrokn")): r"unbrokn is no run .*did you mean .*unbroken'",
        str(waiting): "waiting has no checkpoint yet",
        str(tmp_path): "none of its 1 runs has a checkpoint",
        f"{run}@1": "has no checkpoint '1'.*it has steps",
    }
    for given, message in refused.items():
        with pytest.raises(UserError, match=message):
            open_for_answering([given])
    with pytest.raises(UserError, match="twice; name it once"):
        open_for_answering([str(run), str(run)])
    with pytest.raises(UserError, match="name a run with --run"):
        open_for_answering()
    with pytest.raises(UserError, match=r"use --run=.*or name a step"):
        open_for_answering(model=str(run))


def test_a_fully_trained_run_is_a_base_of_its_own(place, pretrained, run):
    assert pretrained.code == 0, pretrained.err
    full = place.run_dir("pretrained")
    found = open_for_answering([str(full)], mesh=one_device(), adapters=0)
    same(found.params, reopen(full, one_device()).weights)
    served = found.served_base
    assert (served.name, served.parent, found.runs) == ("pretrained", "", ())
    assert not served.is_chat and not served.has_changed()
    # Adapters that were trained on this step have it as their base.
    assert served.identity == open_named(f"{full}@latest").fingerprint
    with pytest.raises(UserError, match="a base model itself, and one base"):
        open_for_answering([str(full)], model=str(run.parents[1] / "model"))
    with pytest.raises(UserError, match=r"was trained on .*served is .*pretrained"):
        open_for_answering([str(run), str(full)])
    with pytest.raises(UserError, match="not an adapter to"):
        find_adapters(*run_addresses([str(full)]), found.base)


def test_a_fully_trained_run_is_read_again_at_its_newest_step(
    place, pretrained, tmp_path
):
    assert pretrained.code == 0, pretrained.err
    run = shutil.copytree(place.run_dir("pretrained"), tmp_path / "run")
    newest = max(place.saved_steps("pretrained"))
    shutil.move(run / "checkpoints" / str(newest), tmp_path / "newest")
    before = open_for_answering([str(run)], mesh=one_device())
    assert not before.served_base.has_changed()
    shutil.move(tmp_path / "newest", run / "checkpoints" / str(newest))
    assert before.served_base.has_changed() and before.served_base.step < newest
    after = before.reread(before.served_base.address)
    assert (after.served_base.step, after.served_base.name) == (newest, "run")
    assert not after.served_base.has_changed()
    same(after.params, reopen(run, one_device()).weights)
    # Whatever was compiled for the old ones fits the new ones.
    like = [{p: (x.shape, x.dtype, x.sharding) for p, x in each.params.items()}
            for each in (before, after)]  # fmt: skip
    assert like[0] == like[1] and after.model is before.model
    assert after.base.fingerprint != before.base.fingerprint


def test_a_model_without_a_run_is_served_alone(run):
    model = str(run.parents[1] / "model")
    found = open_for_answering(model=model, mesh=one_device(), adapters=0)
    assert (found.served_base.root, found.served_base.is_chat) == (model, True)
    with_bank = open_for_answering(model=model, adapters=3, rank=2)
    banked = with_bank.params["layers.mlp.up.kernel"]
    assert (banked.adapters, banked.rank) == (3, 2)
    assert banked.a.dtype == with_bank.model.options.dtype
    assert banked.a.sharding.mesh == with_bank.mesh


def test_int8_weights_say_what_they_cost(run, opened, caplog):
    """The loss is that of the run's own first rows, before and after."""
    found = open_for_answering([str(run)], weights="int8")
    line = r"loss (\S+) instead of (\S+) \((\S+) nats.* on (\d+) tok"
    said = re.search(line, caplog.text)
    _, before, change, tokens = map(float, said.groups())
    assert abs(change) < 0.02 * before and tokens > 100
    # As an evaluation measures it, on the same ids.
    texts = texts_to_measure(run, opened.base.tokenizer)
    base = {p: getattr(leaf, "base", leaf) for p, leaf in opened.params.items()}
    measured = mean_loss(base, opened.model, opened.mesh, texts)
    assert measured == pytest.approx(before, abs=1e-4)
    kinds = {p: type(getattr(leaf, "base", leaf)) for p, leaf in found.params.items()}
    assert kinds["layers.mlp.up.kernel"] is kinds["head.kernel"] is Int8Matrix
    assert kinds["embedding.table"] is not Int8Matrix, "decoding reads few rows of it"
    # Adapters are read onto it as onto any other base.
    _, row = found.read(*found.runs)
    same(row, jax.device_get(opened.read(*opened.runs)[1]))
    with pytest.raises(UserError, match=r"--weights is 'int4'.*must be one of"):
        open_for_answering([str(run)], weights="int4")


def test_a_loss_is_measured_without_a_run(opened):
    texts = texts_to_measure(None, opened.base.tokenizer)
    assert len(texts) == 4 and min(map(len, texts)) > 256
