"""Plans without a compiler, and the step that the compiler is given."""

import dataclasses
import functools
import importlib
import importlib.util
import io
import json
import math
import re
import types

import pytest
import tiny_model
from doors import run_door
from helpers import in_soak
from plan_helpers import EIGHT_B, ONE_B, big_config
from rich.console import Console

from research.config.run_config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    TextConfig,
)
from research.core.errors import UserError
from research.formats.base_model import open_architecture, open_base, random_base
from research.models import attention_kernels
from research.parallel import chips, runtime
from research.parallel import mesh as meshes
from research.parallel.memory_limits import memory_limit
from research.plan import abstract_step, plan_json, planned_devices, planner
from research.plan.__main__ import main
from research.plan.compiled import compile_step
from research.plan.estimate import memory_formulas
from research.plan.estimate.roofline import make_roofline
from research.plan.estimate.step_flops import StepFlops
from research.plan.planned_devices import parse_device, parse_topology
from research.plan.step_costs import Collective
from research.report import plan_tables
from research.tasks import task_registry
from research.tokenize.tokenizer_training import byte_tokenizer
from research.train.step import train_step
from research.train.step.definition_from_config import load_start, make_step_definition

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.make_tiny_model(tmp_path_factory.mktemp("plan") / "model")


def tiny_config(folder, kind="lora", **data):
    """The tiny model's config: LoRA on instructions, or pre-training."""
    if kind == "lora":
        model, rows = ModelConfig(init_from=str(folder)), "instructions"
    else:
        model, rows = ModelConfig(init_from="", preset="tiny"), "text"
    data = {"seq_len": 32, "batch_size": 8, "microbatch_size": 4} | data
    return Config(
        trainable=kind,
        model=model,
        mesh=MESH,
        data=DataConfig(kind=rows, **data),
        text=TextConfig(sources=("a=b",), tokenizer="byte"),
    )


# The step that is planned.


@pytest.mark.parametrize("kind", ["lora", in_soak("full")])
def test_the_lowered_program_is_that_of_training(folder, kind):
    """Planner: a shape and no tokenizer; training: the opened base model."""
    config = tiny_config(folder, kind)
    mesh = meshes.make_mesh(MESH)
    shape = abstract_step.find_architecture(config)
    step = abstract_step.make_abstract_step(config, shape, mesh)
    if kind == "lora":
        base, groups = open_base(str(folder)), None
    else:
        base, groups = random_base("tiny", byte_tokenizer()), 1
    objective = task_registry.make_objective(config, mesh, groups)
    definition = make_step_definition(config, base, mesh, objective)
    params, frozen = load_start(definition, base)
    state = train_step.jit_init(definition)(params)
    trained = train_step.jit_train_step(definition).lower(state, frozen, step.batch)
    assert compile_step.lower(step).as_text() == trained.as_text()


def test_a_large_rank_is_refused_before_a_run_begins_alone(folder, tmp_path):
    """As `research.train` does: older runs have such ranks, and resume."""
    config = dataclasses.replace(tiny_config(folder), run_dir=str(tmp_path))
    config = dataclasses.replace(config, lora=LoRAConfig(rank=65, targets=("query",)))
    shape, target = open_architecture(str(folder)), parse_device("h100:8")
    with pytest.raises(UserError, match=r"lora.rank is 65, and no update of a"):
        planner.plan_estimate(config, shape, target)
    (tmp_path / "config.json").write_text("{}")
    assert planner.plan_estimate(config, shape, target).trained > 0


@pytest.fixture(scope="module")
def planned(folder):
    """The step and the compiled step of a LoRA definition, on eight CPU devices."""
    config = tiny_config(folder)
    architecture = open_architecture(str(folder))
    step = abstract_step.make_abstract_step(
        config, architecture, meshes.make_mesh(MESH)
    )
    return step, compile_step.lower(step).compile()


def test_memory_is_split_without_rest(planned):
    step, program = planned
    real = program.memory_analysis()
    sizes = {n: getattr(real, n) for n in dir(real) if n.endswith("_size_in_bytes")}
    # A CPU keeps its code elsewhere and pads nothing.
    assert sizes["generated_code_size_in_bytes"] == 0
    sizes["generated_code_size_in_bytes"] = 1 << 20
    sizes["argument_size_in_bytes"] += 1 << 10
    stats = types.SimpleNamespace(**sizes)
    memory = compile_step.split_memory(step, stats)
    assert (memory.padding, memory.program) == (1 << 10, 1 << 20)
    assert memory.total == pytest.approx(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    # The norms, of 64 values each, lie whole on all devices.
    matrices = sum(
        math.prod(x.shape) * 2 for p, x in step.frozen.items() if "norm" not in p
    )
    norms = sum(math.prod(x.shape) * 2 for p, x in step.frozen.items() if "norm" in p)
    assert memory.frozen == matrices / 4 + norms
    assert memory.optimizer == pytest.approx(2 * memory.trained, abs=16)
    assert memory.batch == 6 * 4 * 8 * 32 / 4


def test_the_estimate_takes_the_same_arguments(planned):
    step, program = planned
    exact = compile_step.split_memory(step, program.memory_analysis())
    estimate = memory_formulas.estimate_memory(step)
    for part in ("frozen", "trained", "optimizer", "batch"):
        assert getattr(estimate, part) == getattr(exact, part)


# Estimates.


def test_collectives_of_a_mesh_are_on_its_axes():
    mesh = MeshConfig(replica=2, data=1, fsdp=4, tensor=4, context=4)
    plan = planner.plan_estimate(
        big_config(mesh=mesh), ONE_B, parse_device("v5p:4x4x4", 2)
    )
    kinds = {(row.kind, row.axes) for row in plan.traffic}
    assert kinds == {
        ("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-to-all", "fsdp"),
        ("all-reduce", "tensor"), ("all-gather", "context"),
        ("reduce-scatter", "context"), ("all-reduce", "context"),
        ("all-reduce", "replica"),
    }  # fmt: skip
    assert plan.roofline.ici > 0
    # Each chip's share of the gradients, once over the network in bfloat16.
    shared = 2 * sum(row.nbytes for row in plan.traffic if row.axes == "replica") / 2
    assert plan.roofline.dcn == pytest.approx(shared / 6.25e9)
    # The 4,096 tokens of a chip go through the head in four chunks.
    layers = ONE_B.layers * ONE_B.matrices_per_layer
    head = ONE_B.embed * ONE_B.vocab
    assert shared == pytest.approx(2 * (layers + 4 * head) / 16)


def test_lora_sends_next_to_nothing_between_slices():
    mesh = MeshConfig(replica=2, data=1, fsdp=16)
    target = parse_device("v5e:4x4", 2)
    full, lora = (
        planner.plan_estimate(big_config(kind, mesh=mesh), ONE_B, target)
        for kind in ("full", "lora")
    )
    assert lora.roofline.dcn < full.roofline.dcn / 9
    assert lora.memory.frozen * 2 == pytest.approx(full.memory.trained)


def test_what_fits_is_below_the_limit_and_what_does_not_says_so():
    target = parse_device("l4:8")
    small = planner.plan_estimate(big_config(micro=8), ONE_B, target)
    large = planner.plan_estimate(big_config(remat="none", seq=8192), ONE_B, target)
    assert small.fits and small.needed <= 0.92 * 24e9
    assert not large.fits and large.needed > 0.92 * 24e9
    for plan, words in (
        (small, ("fits:",)),
        (large, ("does not fit:", "; at most 92% should be used")),
    ):
        console = Console(record=True, width=120, file=io.StringIO())
        plan_tables.show_plan(console, plan_json.to_json(plan))
        text = console.export_text()
        assert all(said in text for said in words)


def test_cudnn_pays_for_its_mask():
    config = big_config(rows=32, mesh=MeshConfig(data=1, fsdp=8), seq=32768)
    target = parse_device("h100:8")
    needed = {}
    for kernel in ("auto", "xla", "cudnn"):
        model = dataclasses.replace(config.model, attention=kernel)
        asked = dataclasses.replace(config, model=model)
        needed[kernel] = planner.plan_estimate(asked, EIGHT_B, target).needed
    assert needed["auto"] == needed["xla"]
    assert needed["cudnn"] - needed["xla"] == 3 * (32 // 8) * 32768**2


def test_a_permute_takes_one_axis_of_the_torus():
    target = parse_topology("v5p:4x4x4")
    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=64), target.devices())
    permute = Collective("collective-permute", ("fsdp",), 90_000, 1, tuple(range(64)))
    made = make_roofline(StepFlops(0.0, 0.0), 0.0, [permute], target, mesh)
    assert made.ici == pytest.approx(90_000 / (2 * target.chip.link))


# Chips and their names.


def test_the_table_of_chips_is_that_of_the_running_devices():
    kinds = {
        "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12,
        "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165.2e12,
    }  # fmt: skip
    for kind, flops in kinds.items():
        assert chips.by_device_kind(kind).flops == flops
    # Their names begin like those of chips in the table, and their peaks are others.
    for kind in (
        "NVIDIA L40", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A10",
    ):  # fmt: skip
        assert chips.by_device_kind(kind) is None
    for chip in chips.CHIPS.values():
        assert chip.source and chip.hbm and chip.link and chip.flops
        assert not chip.int8_flops or 1.9 < chip.int8_flops / chip.flops < 2.1
        assert chip.platform == ("tpu" if chip.shapes else "gpu")
    config = Config().runtime
    assert runtime.peak_flops(dataclasses.replace(config, peak_tflops=2)) == 16e12
    # No data sheet, so no MFU: two starts must not give one speed two figures.
    assert runtime.peak_flops(config) is None


def test_figures_of_tpus_are_those_of_their_pages():
    """https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e: GB, GB/s, ports, GB/s.

    A compiler leaves a little less memory. The last figure is of all ports of a chip
    and of both directions; the table's links are those of the scaling book.
    """
    known = {
        "v5e": (197e12, 394e12, 16, 819, 4, 400),
        "v5p": (459e12, 918e12, 95, 2765, 6, 1200),
        "v6e": (918e12, 1836e12, 32, 1638, 4, 800),
    }
    for name, (flops, int8, memory, bandwidth, ports, all_links) in known.items():
        chip = chips.CHIPS[name]
        assert (chip.flops, chip.int8_flops) == (flops, int8)
        assert chip.hbm_bandwidth == bandwidth * 1e9
        assert 0.97 <= chip.hbm / (memory * chips.GIB) <= 1.01
        assert 0.85 <= 2 * ports * chip.link / (all_links * 1e9) <= 1.0


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("4090x2", "4090", 2), ("h100x8", "h100", 8), ("RTX 4090", "4090", 1),
        ("rtx4090x2", "4090", 2), ("A100-80GB:4", "a100-80", 4), ("a100", "a100-80", 1),
        ("a100-40", "a100-40", 1), ("nvidia-h100-80gb", "h100", 1),
        ("mi300x", "mi300x", 1), ("mi300x:8", "mi300x", 8), ("mi300xx8", "mi300x", 8),
        ("24GB", "24GB", 1), ("24gb:2", "24GB", 2), ("24GBx2", "24GB", 2),
        ("80G", "80GB", 1),
        ("V5e:4x4", "v5e", 16), ("v5ex8", "v5e", 8),
    ],
)  # fmt: skip
def test_devices_are_named_as_people_name_them(text, name, count):
    target = parse_device(text)
    assert (target.chip.name, target.count) == (name, count)


def test_a_memory_alone_says_that_its_compute_capability_is_assumed():
    reasons = [
        attention_kernels.choose(
            "auto", "gpu", dtype="bfloat16", head_dim=64, length=128,
            capability=parse_device(name).devices()[0].compute_capability,
        ).reason
        for name in ("24GB", "a100")
    ]  # fmt: skip
    assert "GPU has 8.0, as is assumed where only the memory is known" in reasons[0]
    assert reasons[1].endswith("this GPU has 8.0")


def test_a_memory_alone_is_judged_like_a_card_of_that_memory_and_claims_no_speed():
    config = big_config(rows=8, micro=8)
    card, alone = (
        planner.plan_estimate(config, ONE_B, parse_device(name))
        for name in ("4090", "24GB")
    )
    assert (alone.needed, alone.limit) == (card.needed, card.limit)
    shown = plan_json.to_json(alone)
    assert shown["best"]["tokens_per_second"] == shown["best"]["mfu"] == 0
    assert any("24GB is a memory, not a chip" in note for note in shown["notes"])
    assert parse_device("24GiB").chip.hbm == 24 * 2**30
    console = Console(record=True, width=120, file=io.StringIO())
    plan_tables.show_plan(console, shown)
    text = console.export_text()
    assert "tokens/s" not in text and "a step at best" not in text


def test_a_plan_names_what_its_chips_leave_unknown():
    config = big_config(rows=64, micro=16, mesh=MeshConfig(data=1, fsdp=16))
    plans = {
        name: planner.plan_estimate(config, ONE_B, parse_device(name))
        for name in ("l40s:16", "h100:16", "v5e:16")
    }
    notes = {name: " ".join(plan_json.to_json(p)["notes"]) for name, p in plans.items()}
    assert "between hosts of l40s" in notes["l40s:16"]
    assert "between hosts" not in notes["h100:16"] + notes["v5e:16"]
    # JAX takes three quarters of a GPU, unless it is told otherwise.
    limit = 0.75 * plans["l40s:16"].target.chip.hbm
    assert plans["l40s:16"].needed <= limit
    small = parse_device(f"{plans['l40s:16'].needed / 0.8e9:.2f}GB:16")
    noted = plan_json.to_json(planner.plan_estimate(config, ONE_B, small))["notes"]
    assert any("XLA_CLIENT_MEM_FRACTION=0.92" in note for note in noted)
    assert "MEM_FRACTION" not in " ".join(notes.values())


def test_targets():
    target = parse_topology("v5e:4x4", 2)
    assert (target.count, target.shape, target.name) == (32, (4, 4), "2 x v5e:4x4")
    assert parse_topology("v5p:4x8x12").count == 384
    assert parse_device("v5p:64").shape == (4, 4, 4)
    assert parse_device("h100").count == 1
    devices = target.devices()
    assert devices[17].coords == (1, 0, 0) and devices[17].slice_index == 1


@pytest.mark.parametrize(
    ("parse", "name", "told"),
    [
        (parse_topology, "v5e:3x7", "known as v5e:1x1, v5e:2x2"),
        (parse_topology, "v5e:32x32", "v5e:16x16"),
        (parse_topology, "v5p:8x8x4", "v5p:4x8x8"),
        (parse_topology, "v5p:0x4x4", "known as"),
        (parse_topology, "v5f:4x4", "did you mean 'v5"),
        (parse_topology, "h100:8", "none of v4, v5e, v5p, v6e"),
        (parse_topology, "", "none of v4"),
        (parse_device, "h10:8", "did you mean 'h100'"),
        (parse_device, "24", "did you mean '24GB'"),
        (parse_device, "80gig:8", "did you mean '80GB'"),
        (parse_device, "h100:none", "write it as h100:8, 4090x2, 24GB, v5e:4x4"),
        (parse_device, "h100:0", "write it as h100:8, 4090x2, 24GB, v5e:4x4"),
        (parse_device, "v5e:17", "--device is 'v5e:17'; v5e is known as"),
        (parse_device, "v5e:3x7", "--device is 'v5e:3x7'; v5e is known as"),
        (parse_device, "h100:2x4", "--device is 'h100:2x4'; write it as h100:8"),
        (parse_device, "cpu:2x2", "--device is 'cpu:2x2'; write it as"),
        (parse_device, "v5f:2x2", "--device is 'v5f:2x2'; 'v5f' is none of"),
        (parse_device, "rtx4080", "none of .* a memory such as 24GB"),
        (parse_device, "mi300x8", "did you mean 'mi300x'"),
        (parse_device, "0GB", "none of"),
        (parse_device, "24GB:1.5", "write it as"),
    ],
)
def test_a_name_that_does_not_exist_lists_those_that_do(parse, name, told):
    with pytest.raises(UserError, match=told) as raised:
        parse(name)
    assert "\n" not in str(raised.value)


# The model's shape, without the model.


def test_shapes_without_weights_or_tokenizer(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    config = dataclasses.replace(
        tiny_config(folder), model=ModelConfig(init_from=str(tmp_path))
    )
    shape = abstract_step.find_architecture(config)
    assert shape == open_base(str(folder)).architecture
    assert abstract_step.find_architecture(config, "llama-1b") == ONE_B


@pytest.mark.parametrize(
    ("tokenizer", "vocab"),
    [("byte", 384), ("bpe:5000", 5120), ("hub://owner/name", 128256)],
)
def test_the_vocabulary_is_the_tokenizers_where_that_is_cheap(tokenizer, vocab):
    config = big_config()
    text = dataclasses.replace(config.text, tokenizer=tokenizer)
    config = dataclasses.replace(config, text=text)
    assert abstract_step.find_architecture(config).vocab == vocab


def test_a_model_out_of_reach_asks_for_a_preset():
    config = big_config("lora")
    with pytest.raises(UserError, match=r"hub://o/n .*--preset=NAME.*llama3.1-8b"):
        abstract_step.find_architecture(config)
    with pytest.raises(UserError, match="did you mean 'llama-1b'"):
        abstract_step.find_architecture(config, "lama-1b")
    for given in ("models/llama", "hub://o/n", "llama.gguf"):
        with pytest.raises(UserError, match=f"--config.model.init_from={given}"):
            abstract_step.find_architecture(config, given)


def test_a_plan_of_bfloat16_parameters_counts_float32_moments_and_gradients():
    target, config = parse_device("h100:8"), big_config(remat="full")
    narrow = dataclasses.replace(config.model, param_dtype="bfloat16")
    wide, narrow = (
        planner.plan_estimate(each, ONE_B, target).memory
        for each in (config, dataclasses.replace(config, model=narrow))
    )
    assert narrow.trained == wide.trained / 2
    assert narrow.optimizer == wide.optimizer
    assert narrow.temporaries == wide.temporaries


def test_a_plan_counts_the_phases_between_steps():
    """A step splits rows of 32,768 tokens eight ways; a prompt of that length is whole.

    In pre-training prompts are beginnings such as those of the config.
    """
    target, mesh = parse_device("h100:8"), MeshConfig(context=8, data=1)
    rows = {"seq_len": 32768, "batch_size": 8, "microbatch_size": 1}
    config = big_config("lora", mesh=mesh)
    needed, phases = {}, {}
    for kind in ("instructions", "text"):
        data = DataConfig(kind, **rows)
        asked = dataclasses.replace(
            config, data=data, text=TextConfig(sources=("a=b",))
        )
        plan = planner.plan_estimate(asked, EIGHT_B, target)
        needed[kind], phases[kind] = plan.needed - plan.memory.total, plan.phase
    assert phases == {"instructions": "samples", "text": "step"}
    cache = 2 * 2 * EIGHT_B.layers * 32768 * EIGHT_B.kv_heads * EIGHT_B.head_dim
    assert needed["instructions"] > cache / 2 and needed["text"] == 0
    shown = io.StringIO()
    plan_tables.show_plan(Console(file=shown, width=160), plan_json.to_json(plan))
    assert "for samples" not in shown.getvalue()


# The door.


def test_the_door_estimates_without_a_compiler(place):
    flags = ("--config=config.py", "--device=h100:4", "--json=plan.json")
    done = place.run("plan", *flags, "--config.mesh.fsdp=2")
    assert (done.code, done.err.count("Traceback")) == (0, 0), done.err
    assert "fits" in done.out and "tokens/s" in done.out
    plan = json.loads((place.folder / "plan.json").read_text())
    assert plan["mesh"] == {"data": 2, "fsdp": 2}
    assert plan["fits"] and plan["source"] == "estimated"
    # The tiny model keeps less for a step than for the answer to a prompt.
    assert plan["hbm_needed"] >= sum(plan["memory"].values())
    assert plan["best"]["mfu"] > plan["not_overlapped"]["mfu"] > 0
    shown = io.StringIO()
    plan_tables.show_plan(Console(file=shown, width=160), plan)
    assert shown.getvalue() == done.out, "the file has all that the terminal shows"


def test_the_door_says_what_does_not_fit_and_what_is_wrong(place):
    big = ("--preset=llama3.1-8b", "--config.trainable=full")
    big = (*big, "--config.lora.rank=16", "--config.lora.dropout=0.0")
    plan = functools.partial(run_door, main, place.folder, "plan", "--config=config.py")
    done = plan("--device=l4:4", *big)
    assert (done.returncode, "does not fit" in done.stdout) == (1, True), done.stderr
    done = plan()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no chips are named")
    assert done.stderr.count("\n") == 1


def test_rows_that_the_mesh_cannot_split_name_the_axes_that_do(folder):
    config = tiny_config(folder, microbatch_size=2)
    mesh = meshes.make_mesh(MeshConfig(replica=2, data=2, fsdp=2))
    said = r"has 2 rows .*splits a batch into 8 .*fsdp\*expert\).*multiple of 8"
    with pytest.raises(UserError, match=said):
        objective = task_registry.make_objective(config, mesh)
        make_step_definition(config, open_base(str(folder)), mesh, objective)


def test_a_plan_that_cannot_be_written_is_not_made(tmp_path):
    """Said before a compile of minutes."""
    plan_json.check_json(str(tmp_path / "plan.json"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing/plan.json", tmp_path, tmp_path / "file/plan.json"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            plan_json.check_json(str(path))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed"
)
def test_without_libtpu_one_line_says_where_to_get_it(place):
    flags = ("--config=config.py", "--topology=v5e:4x4")
    done = run_door(main, place.folder, "plan", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "pip install libtpu" in done.stderr and "--device=v5e:4x4" in done.stderr


GROUPS = {
    "version 2": ("0::/a/b", {"a/memory.max": "max", "a/b/memory.max": "3000"}),
    "version 2, above": ("0::/a/b", {"a/memory.max": "3000", "a/b/memory.max": "max"}),
    "version 2, own top": ("0::/", {"memory.max": "3000"}),
    "version 1": (
        "5:cpu,cpuacct:/a\n4:memory:/a\n0::/",
        {"memory/a/memory.limit_in_bytes": "3000", "cpu/a/memory.limit_in_bytes": "1"},
    ),
    "version 1, only the top is seen": (
        "4:memory:/docker/x",
        {"memory/memory.limit_in_bytes": "3000"},
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_limit_of_a_container_is_its_memory(tmp_path, name):
    groups, files = GROUPS[name]
    (tmp_path / "cgroup").write_text(groups + "\n")
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content + "\n")
    assert memory_limit(tmp_path / "cgroup", tmp_path) == 3000


def test_without_a_limit_the_machine_is_the_limit(tmp_path, monkeypatch):
    assert memory_limit(tmp_path / "absent", tmp_path) == math.inf
    monkeypatch.setattr(planned_devices, "memory_limit", lambda: 2.0**30)
    assert parse_device("cpu:2").chip.hbm == 2.0**29
