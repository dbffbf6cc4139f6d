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

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
)
from research.config.saved_config import to_json
from research.core.errors import DamagedError, UserError
from research.core.visible_text import visible
from research.engine.sampler import Sampling
from research.formats.base_model import open_base
from research.models import attention_kernels, attention_sharding
from research.models.presets import PRESETS
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.runs.reopen import fitting_mesh, reopen
from research.runs.run_directory import RunDir
from research.tasks import task_registry
from research.tokenize.conversation import Turn
from research.train import start_to_report
from research.train.step import train_step
from research.train.step.definition_from_config import make_step_definition
from research.weights import parameter_paths

STEPS = 2
SAMPLING = Sampling(max_new_tokens=4)
BYTES_READ = "/tensorstore/kvstore/file/bytes_read"


def small_config(folder, name, **changes):
    model = ModelConfig(init_from=str(folder / "model"), dtype="float32")
    config = Config(
        run_dir=str(folder / name),
        steps=STEPS,
        model=dataclasses.replace(model, **changes.pop("model", {})),
        lora=LoRAConfig(rank=2, dropout=0.0),
        data=DataConfig(
            path=str(folder / "rows.jsonl"),
            seq_len=128,
            batch_size=8,
            microbatch_size=8,
            held_out=8,
        ),
        # A rate that moves each parameter.
        optim=OptimConfig(learning_rate=1e-2, warmup=0.0),
        eval=EvalConfig(every=STEPS, prompts=1, max_new_tokens=4),
        checkpoint=CheckpointConfig(every=STEPS),
        runtime=RuntimeConfig(
            compilation_cache="", peak_tflops=0.05, watchdog_s=0, progress="lines"
        ),
    )
    runtime = dataclasses.replace(config.runtime, **changes.pop("runtime", {}))
    return dataclasses.replace(config, runtime=runtime, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`lora`: as any. `full`: all parameters, with an optimizer on the host."""
    folder = tmp_path_factory.mktemp("reopen")
    tiny_model.make_tiny_model(folder / "model")
    rows = [
        {
            "instruction": f"Add {i} to {i + 1}",
            "context": "",
            "response": f"{2 * i + 1}",
        }
        for i in range(64)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start_to_report.runtime, "start", lambda config: None)
        full = small_config(
            folder,
            "full",
            trainable="full",
            runtime={"offload_optimizer": True},
            eval=EvalConfig(every=STEPS, prompts=0),
        )
        assert start_to_report.train([full]) == 0
        assert start_to_report.train([small_config(folder, "lora")]) == 0
    return folder


@pytest.fixture
def splash(runs, monkeypatch):
    """A LoRA run trained by Splash, as on a TPU: Pallas interprets the kernel."""
    used = set()

    def interpreted(*arrays, kernel, **options):
        used.add(kernel)
        return attention_kernels.packed_attention(
            *arrays, kernel=kernel, interpret=True, **options
        )

    with monkeypatch.context() as patch:
        patch.setattr(start_to_report.runtime, "start", lambda config: None)
        patch.setattr(attention_kernels, "_splash_lacks", lambda *_: None)
        patch.setattr(attention_sharding, "packed_attention", interpreted)
        config = small_config(runs, "splash", model={"attention": "splash"})
        assert start_to_report.train([config]) == 0
    assert used == {"splash"}
    return runs / "splash"


def one_device():
    return meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])


def rewritten(runs, tmp_path, name, **model):
    """A copy of a run whose stored config has other values."""
    folder = shutil.copytree(runs / name, tmp_path / name)
    config = RunDir(folder).config()
    changed = dataclasses.replace(config.model, **model)
    config = dataclasses.replace(config, model=changed)
    (folder / "config.json").write_text(to_json(config))
    return folder


def saved_state(runs, name):
    """The whole training state, read as a resumed run reads it."""
    folder = RunDir(runs / name)
    config = folder.config()
    plain = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention="xla")
    )
    base = open_base(config.model.init_from)
    devices = meshes.make_mesh(MeshConfig())
    objective = task_registry.make_objective(plain, devices)
    definition = make_step_definition(plain, base, devices, objective)
    with Checkpointer(
        folder.checkpoints, config.checkpoint, folder.identity(), read_only=True
    ) as checkpointer:
        return checkpointer.restore(train_step.abstract_state(definition)).state


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def answer(run):
    ids = run.prompts.encode_prompt([Turn("user", "Add 3 to 4")])
    return run.generators()["tuned"].answer(ids, SAMPLING, frozenset())


# -- the machine that trained does not matter -----------------------------------------


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_run_of_an_accelerator_opens_on_a_cpu_and_answers(runs, tmp_path, kernel):
    """Nothing of a checkpoint tells the kernel; the stored config does."""
    folder = rewritten(runs, tmp_path, "lora", attention=kernel, remat="full")
    check_opened(folder, saved_state(runs, "lora"))


@pytest.mark.soak
def test_a_run_trained_by_splash_opens_on_a_cpu_and_answers(runs, splash):
    check_opened(splash, saved_state(runs, "splash"))


def test_a_run_with_an_offloaded_optimizer_opens_and_answers(runs):
    assert RunDir(runs / "full").config().runtime.offload_optimizer
    check_opened(runs / "full", saved_state(runs, "full"))


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


def test_the_answer_is_the_one_of_the_report(runs):
    """Greedy, of the first held-out row, as training ended."""
    found = reopen(runs / "lora")
    report = (runs / "lora" / "report.md").read_text()
    asked = next(i for i in range(64) if f"Add {i} to {i + 1}" in report)
    ids = found.prompts.encode_prompt([Turn("user", f"Add {asked} to {asked + 1}")])
    for generator in found.generators(compare=True).values():
        said = generator.answer(ids, SAMPLING, found.prompts.stop_ids).strip()
        assert visible(said) in report


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


def test_opening_a_full_run_holds_and_reads_no_optimizer_state(runs):
    state, for_state = bytes_read(lambda: saved_state(runs, "full"))
    size = parameter_paths.nbytes(state.params)
    assert parameter_paths.nbytes(state) > 2.9 * size
    del state
    (found, held), for_params = bytes_read(lambda: opened(runs / "full"))
    assert held == parameter_paths.nbytes(found.params) == size
    # The moments are two thirds of the state; files hold a little beside the arrays.
    assert for_state > 2.5 * size
    assert for_params < 1.2 * size
    assert not found.frozen


def test_opening_a_lora_run_holds_adapters_and_base_alone(runs):
    found, held = opened(runs / "lora")
    paths = parameter_paths.flatten(found.params)[0]
    assert paths and all(path.endswith((".a", ".b")) for path in paths)
    assert held == parameter_paths.nbytes((found.params, found.frozen))


def test_the_compute_dtype_is_read_directly(runs, tmp_path):
    """As a cast after the restore, in half the memory."""
    folder = rewritten(runs, tmp_path, "full", dtype="bfloat16")
    whole = reopen(folder, one_device())
    half = reopen(folder, one_device(), in_compute_dtype=True)
    assert {x.dtype for x in jax.tree.leaves(whole.params)} == {jnp.dtype("float32")}
    same(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole.params))


# -- on the devices at hand ----------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "full"])
def test_parameters_lie_over_all_devices(runs, name):
    one, eight = reopen(runs / name, one_device()), reopen(runs / name)
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


def test_a_checkpoint_that_is_not_there_is_named(runs):
    with pytest.raises(UserError, match=r"no checkpoint '7'; it has steps 2$"):
        reopen(runs / "full", step="7")
    with pytest.raises(UserError, match=r"no checkpoint '-2'"):
        reopen(runs / "full", step="-2")


def test_adapters_of_another_rank_are_refused(runs, tmp_path):
    folder = shutil.copytree(runs / "lora", tmp_path / "run")
    config = dataclasses.replace(RunDir(folder).config(), lora=LoRAConfig(rank=4))
    (folder / "config.json").write_text(to_json(config))
    with pytest.raises(UserError, match="other parameters"):
        reopen(folder)


def test_another_base_model_is_refused(runs, tmp_path):
    other = tiny_model.make_tiny_model(tmp_path / "other", seed=1)
    folder = rewritten(runs, tmp_path, "lora", init_from=str(other))
    with pytest.raises(UserError, match="base model"):
        reopen(folder)


def test_nothing_is_written(runs):
    def content():
        files = (f for f in (runs / "full").rglob("*") if f.is_file())
        return {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in files}

    before = content()
    reopen(runs / "full")
    assert content() == before


def test_a_newest_step_that_is_not_finite_gives_way_to_the_one_before(
    runs, tmp_path, caplog
):
    folder = RunDir(shutil.copytree(runs / "full", tmp_path / "full"))
    state = saved_state(runs, "full")
    ruined = {**state.params, "head.kernel": state.params["head.kernel"] * jnp.nan}
    keep, identity = folder.config().checkpoint, folder.identity()
    with Checkpointer(folder.checkpoints, keep, identity) as checkpointer:
        ruined = dataclasses.replace(state, params=ruined)
        checkpointer.save(STEPS + 1, ruined, {}, None)
    found = reopen(folder.path, one_device())
    same(found.params, reopen(runs / "full", one_device()).params)
    assert "step 2 is opened instead: checkpoint 3 " in caplog.text
    with pytest.raises(DamagedError, match=r"params\.head\.kernel holds a number"):
        reopen(folder.path, one_device(), step="3")
