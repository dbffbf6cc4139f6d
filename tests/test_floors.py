"""The shape of the code: imports only go down, files and functions stay short."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "research"

# A file imports only lower floors; `models`, `data` and `tasks` are packages on one
# floor each, whose files may import their own siblings.
FLOORS = {
    "errors": -1,  # under everything, so that anyone can raise for the user
    "knobs": 0, "knob_checks": 0, "matrix": 0, "batch": 0, "caches": 0, "chips": 0,
    "phases": 0, "provenance": 0, "processes": 0,
    "config": 1, "trees": 1, "watchdog": 1, "stopping": 1, "history": 1,
    "runtime": 2, "mesh": 2, "progress": 2,
    "models": 3, "data": 3,
    "lora": 4, "weights": 4, "metrics": 4,
    "sharded_attention": 4, "feed": 4,
    "trainable": 5, "loss": 5, "optim": 5, "base": 5, "report": 5,
    "step": 6, "sampling": 6,
    "saving": 7, "evaluate": 7, "jobs": 7, "doctor": 7, "exporting": 7,
    "loop": 8, "profiling": 8, "run_dir": 8, "answers": 8, "step_log": 8,
    "tasks": 9, "planning": 9,
    "fitting": 10, "chatting": 10, "doors": 10, "starts": 10,
    "training": 11,
    "together": 12,
    "train": 12, "generate": 12, "export": 12, "tokenize": 12, "plan": 12,
    "checkpoints": 12, "train_together": 13,
}  # fmt: skip

FILES = sorted(f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py")


def dotted(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


MODULES = {dotted(file): file for file in FILES}


def floor(module):
    """`research.data.instructions.chat` lies where `research.data` does."""
    return FLOORS[module.split(".")[1]]


@functools.cache
def imported(file):
    """Modules named by any import statement of a file, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(inner & MODULES.keys() or {node.module})
    return names


def imported_here(module):
    return imported(MODULES[module]) & MODULES.keys()


def test_every_file_has_a_floor():
    unplaced = [m for m in MODULES if m.split(".")[1] not in FLOORS]
    assert not unplaced, f"{unplaced}: give each a floor in tests/test_floors.py"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    for other in imported_here(module):
        # A package's files may use their siblings and what stands above the package.
        room = other.rpartition(".")[0]
        siblings = room != "research" and f"{module}.".startswith(f"{room}.")
        assert siblings or floor(other) < floor(module), f"{module} imports {other}"


def test_models_and_data_never_see_each_other():
    for module in MODULES:
        for mine, other in (("models", "data"), ("data", "models")):
            if module.startswith(f"research.{mine}."):
                seen = [m for m in imported_here(module) if f".{other}." in m]
                assert not seen, f"{module} imports {seen}"


def test_imports_have_no_cycle():
    finished = set()

    def visit(module, trail):
        assert module not in trail, f"cycle: {' -> '.join((*trail, module))}"
        if module not in finished:
            for other in imported_here(module):
                visit(other, (*trail, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_package_knows_no_config_launcher_or_test():
    for module, file in MODULES.items():
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & {"configs", "launch", "tests", "conftest"}, module


def test_flax_stays_inside_the_models():
    for module, file in MODULES.items():
        tops = {name.split(".")[0] for name in imported(file)}
        assert "flax" not in tops or module.startswith("research.models."), module


LAUNCHER = sorted((PACKAGE.parent / "launch").rglob("*.py"))


@pytest.mark.parametrize("file", [*FILES, *LAUNCHER], ids=dotted)
def test_files_and_functions_are_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def run_blocked(allowed, program):
    """Runs a program in which every other third-party package cannot be imported."""
    blocker = f"""
import sys
import {", ".join(allowed)}

class Blocker:
    known = sys.stdlib_module_names | {{m.split(".")[0] for m in sys.modules}}
    # What JAX itself imports late; `research` is what is tested.
    known |= {{"scipy", "opt_einsum", "research"}}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.known:
            raise ImportError(f"{{name}} is not part of a bare image")

sys.meta_path.insert(0, Blocker())
"""
    done = subprocess.run(
        [sys.executable, "-c", blocker + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


CORE_PROGRAM = """
import jax
from research import loss, lora, matrix, mesh, optim, step, trainable
from research.batch import Batch
from research.config import Config, MeshConfig
from research.models.presets import PRESETS
from research.models.transformer import Model

config = Config()
model = Model(PRESETS["tiny"])
split = trainable.make(config, model.specs)
job = step.Job(
    model,
    split,
    optim.make_optimizer(config.optim, config.steps, split.specs),
    mesh.make_mesh(MeshConfig(), jax.devices()[:1]),
    loss_chunk=8,
)
frozen = {p: jax.ShapeDtypeStruct(s.shape, "bfloat16") for p, s in model.specs.items()}
ids = jax.ShapeDtypeStruct((1, 2, 16), "int32")
weights = jax.ShapeDtypeStruct((1, 2, 16), "float32")
batch = Batch(ids, ids, weights, ids, ids, ids)
lowered = step.jit_train_step(job).lower(step.abstract_state(job), frozen, batch)
print(len(lowered.as_text()))
"""


def test_the_core_runs_on_a_bare_accelerator_image():
    """A step is made from jax, flax, optax and numpy alone, late imports included."""
    assert int(run_blocked(("jax.numpy", "flax.nnx", "optax"), CORE_PROGRAM)) > 10_000


def test_lora_and_the_matrix_need_no_flax():
    run_blocked(("jax.numpy",), "import research.lora, research.loss, research.trees")


def test_the_blocker_of_this_file_blocks():
    with pytest.raises(AssertionError, match="not part of a bare image"):
        run_blocked(("jax.numpy",), "import flax")
