"""A run opens on another machine than the one that trained it: parameters only."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
import tiny_model
from helpers import close
from pretraining_runs import PRETRAIN_STEPS
from small_run import make_small_place, one_device, saved_state, small_config

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import LoRAConfig, MeshConfig, RuntimeConfig
from research.config.saved_config import to_json
from research.core.errors import DamagedError, UserError
from research.engine.requests import Request, Sampling
from research.models import attention_kernels, attention_sharding
from research.models.presets import PRESETS
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.runs.reopen import fitting_mesh, reopen
from research.runs.run_directory import RunDir
from research.tokenize.conversation import Turn
from research.train import start_to_report
from research.weights import parameter_paths

SAMPLING = Sampling(max_new_tokens=4)
BYTES_READ = "/tensorstore/kvstore/file/bytes_read"


@pytest.fixture
def lora(place, unbroken):
    """A finished run of adapters, which a process with one device trained."""
    assert unbroken.code == 0, unbroken.err
    return place.run_dir("unbroken")


@pytest.fixture
def full(place, pretrained):
    """A finished run of all parameters, from random ones."""
    assert pretrained.code == 0, pretrained.err
    return place.run_dir("pretrained")


@pytest.fixture
def run(request):
    """The run of the fixture that a test names as its parameter."""
    return request.getfixturevalue(request.param)


def train_here(folder, model=None, **changes):
    """Trains two steps in this process, and returns the run directory."""
    make_small_place(folder)
    config = small_config(folder, "run", 2, model)
    data = dataclasses.replace(config.data, seq_len=128, batch_size=8)
    config = dataclasses.replace(config, data=data, mesh=MeshConfig(), **changes)
    assert start_to_report.train([config]) == 0
    return folder / "run"


def rewritten(run, tmp_path, runtime=None, **model):
    """A copy of a run whose stored config has other values."""
    folder = shutil.copytree(run, tmp_path / run.name)
    config = RunDir(folder).config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        runtime=dataclasses.replace(config.runtime, **(runtime or {})),
    )
    (folder / "config.json").write_text(to_json(config))
    return folder


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def answer(run):
    ids = run.prompts.encode_prompt([Turn("user", "Add 3 to 4")])
    (said,) = run.generators()["tuned"].answers([Request(tuple(ids), SAMPLING)])
    return said


# -- the machine that trained does not matter -----------------------------------------


def test_a_run_of_an_accelerator_opens_on_a_cpu_and_answers(lora, tmp_path):
    """Nothing of a checkpoint tells the kernel; the stored config does."""
    folder = rewritten(lora, tmp_path, attention="splash", remat="full")
    check_opened(folder, saved_state(lora).state)


def test_a_run_with_an_offloaded_optimizer_opens_and_answers(full, tmp_path):
    """As another accelerator stores it; a checkpoint does not tell the memory."""
    offload = {"offload_optimizer": True}
    folder = rewritten(full, tmp_path, runtime=offload, attention="cudnn")
    check_opened(folder, saved_state(folder).state)


@pytest.mark.soak
def test_a_run_trained_with_an_offloaded_optimizer_opens(tmp_path):
    runtime = RuntimeConfig(
        compilation_cache="", offload_optimizer=True, progress="lines"
    )
    run = train_here(tmp_path, trainable="full", runtime=runtime)
    check_opened(run, saved_state(run).state)


@pytest.mark.soak
def test_a_run_trained_by_splash_opens_on_a_cpu_and_answers(tmp_path, monkeypatch):
    """As on a TPU: Pallas interprets the kernel."""
    used = set()

    def interpreted(*arrays, kernel, **options):
        used.add(kernel)
        return attention_kernels.packed_attention(
            *arrays, kernel=kernel, interpret=True, **options
        )

    with monkeypatch.context() as patch:
        patch.setattr(attention_kernels, "_splash_lacks", lambda *_: None)
        patch.setattr(attention_sharding, "packed_attention", interpreted)
        run = train_here(tmp_path, {"attention": "splash"})
    assert used == {"splash"}
    check_opened(run, saved_state(run).state)


def check_opened(folder, state):
    found = reopen(folder, one_device())
    assert answer(found)
    same(found.params, state.params)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found.params)}
    assert meshes.HOST_MEMORY not in kinds
    # The model scores whole rows, too, by the kernel of this machine.
    row = jnp.ones((1, 128), jnp.int32)
    places = jnp.arange(128)[None]
    hidden = jax.jit(found.model.hidden)(found.weights, row, places, row)
    assert np.isfinite(hidden).all()
    assert found.model.options.remat == "none"


def test_the_answer_is_the_one_of_the_report(lora):
    """Greedy, to a held-out prompt, as training ended."""
    found = reopen(lora)
    report = json.loads((lora / "answers.json").read_text())["answers"]
    asked = min(report, key=lambda said: len(said["prompt"]))
    question, _, context = asked["prompt"].partition("\n\n")
    ids = found.prompts.encode_prompt([Turn("user", question)], context)
    sampling = Sampling(max_new_tokens=found.config.eval.max_new_tokens)
    for name, generator in found.generators(compare=True).items():
        request = Request(tuple(ids), sampling, found.prompts.stop_ids)
        (said,) = generator.answers([request])
        assert said.strip() == asked[name]


# -- only parameters -----------------------------------------------------------------


def opened(folder):
    """The run on one device, and the bytes of all arrays that its opening has left."""
    before = {id(x) for x in jax.live_arrays()}
    found = reopen(folder, one_device())
    return found, sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)


def bytes_read(action):
    """Return the result of `action` and the bytes that TensorStore read for it."""

    def count():
        metrics = tensorstore.experimental_collect_matching_metrics(BYTES_READ)
        return sum(value["value"] for each in metrics for value in each["values"])

    before = count()
    return action(), count() - before


def test_opening_a_full_run_holds_and_reads_no_optimizer_state(full):
    state, for_state = bytes_read(lambda: saved_state(full).state)
    size = parameter_paths.nbytes(state.params)
    assert parameter_paths.nbytes(state) > 2.9 * size
    del state
    (found, held), for_params = bytes_read(lambda: opened(full))
    assert held == parameter_paths.nbytes(found.params) == size
    # The moments are two thirds of the state; files hold a little beside the arrays.
    assert for_state > 2.5 * size
    assert for_params < 1.2 * size
    assert not found.frozen


def test_opening_a_lora_run_holds_adapters_and_base_alone(lora):
    found, held = opened(lora)
    paths = parameter_paths.flatten(found.params)[0]
    assert paths and all(path.endswith((".a", ".b")) for path in paths)
    assert held == parameter_paths.nbytes((found.params, found.frozen))


def test_the_compute_dtype_is_read_directly(full, tmp_path):
    """As a cast after the restore, in half the memory."""
    folder = rewritten(full, tmp_path, dtype="bfloat16")
    whole = reopen(folder, one_device())
    half = reopen(folder, one_device(), in_compute_dtype=True)
    assert {x.dtype for x in jax.tree.leaves(whole.params)} == {jnp.dtype("float32")}
    same(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole.params))


# -- on the devices at hand ----------------------------------------------------------


@pytest.mark.parametrize("run", ["lora", "full"], indirect=True)
def test_parameters_lie_over_all_devices(run):
    one, eight = reopen(run, one_device()), reopen(run)
    assert eight.mesh.size == len(jax.devices()) == 8
    for leaf in jax.tree.leaves((eight.params, eight.frozen)):
        assert leaf.sharding.mesh == eight.mesh
    for path, leaf in parameter_paths.flatten(eight.weights)[0].items():
        if "norm" in path or path.endswith((".a", ".b", "scale")):
            continue
        share = leaf.addressable_shards[0].data.size / leaf.size
        assert share == 1 / 8, path
    same(eight.params, one.params)
    ids = jnp.asarray([one.prompts.encode_prompt([Turn("user", "Add 3 to 4")])])

    def hidden(run):
        decode = jax.jit(run.model.decode)
        return decode(run.weights, ids, run.model.init_cache(1, 256))[0]

    close(hidden(eight), hidden(one), rtol=1e-4)
    assert answer(eight) == answer(one)


def test_a_mesh_takes_as_many_devices_as_the_shapes_allow():
    def sizes(**changes):
        specs = Model(dataclasses.replace(PRESETS["tiny"], **changes)).specs
        found = fitting_mesh(specs, jax.devices())
        return found.shape["fsdp"], found.shape["tensor"]

    wide = {"embed": 64, "mlp": 64, "heads": 8, "head_dim": 8, "vocab": 64}
    assert sizes(**wide, kv_heads=8) == (1, 8)
    assert sizes(**wide, kv_heads=2) == (4, 2)
    odd = wide | {"heads": 3, "kv_heads": 3, "embed": 4 * 9}
    assert sizes(**odd) == (4, 1)
    assert sizes(**odd | {"embed": 9}) == (1, 1)


# -- refusals ------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there_is_named(full):
    with pytest.raises(UserError, match=r"no checkpoint '7'; it has steps (\d+, )*12$"):
        reopen(full, step="7")
    with pytest.raises(UserError, match=r"no checkpoint '-2'"):
        reopen(full, step="-2")


def test_adapters_of_another_rank_are_refused(lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "run")
    config = dataclasses.replace(RunDir(folder).config(), lora=LoRAConfig(rank=2))
    (folder / "config.json").write_text(to_json(config))
    with pytest.raises(UserError, match="other parameters"):
        reopen(folder)


def test_another_base_model_is_refused(lora, tmp_path):
    other = tiny_model.make_tiny_model(tmp_path / "other", seed=1)
    folder = rewritten(lora, tmp_path, init_from=str(other))
    with pytest.raises(UserError, match="base model"):
        reopen(folder)


def test_nothing_is_written(full):
    def content():
        files = (f for f in full.rglob("*") if f.is_file())
        return {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in files}

    before = content()
    reopen(full)
    assert content() == before


def test_a_newest_step_that_is_not_finite_gives_way_to_the_one_before(
    full, tmp_path, caplog
):
    folder = RunDir(shutil.copytree(full, tmp_path / "full"))
    state = saved_state(full).state
    path = "final_norm.scale"
    ruined = {**state.params, path: state.params[path] * jnp.nan}
    keep, identity = folder.config().checkpoint, folder.identity()
    with Checkpointer(folder.checkpoints, keep, identity) as checkpointer:
        ruined = dataclasses.replace(state, params=ruined)
        checkpointer.save(PRETRAIN_STEPS + 1, ruined, {}, None)
    found = reopen(folder.path, one_device())
    same(found.params, reopen(full, one_device()).params)
    assert "step 12 is opened instead: checkpoint 13 " in caplog.text
    with pytest.raises(DamagedError, match=r"params\.final_norm\.scale holds a number"):
        reopen(folder.path, one_device(), step="13")
