"""The shape of the code: rooms in one order, names that mean one thing, short files."""

import ast
import collections
import dataclasses
import functools
import importlib
import re
import subprocess
import sys
import types

import pytest
from source_files import FILES, LAUNCHER, PACKAGE, ROOT, dotted, files_of

# A room imports only itself and rooms to its left. A `__main__.py` is a door: it may
# import anything, and nothing imports it.
ROOMS = (
    "core", "config", "weights", "parallel", "models", "tokenize", "formats", "data",
    "engine", "tasks", "checkpoints", "runs", "report", "evaluate", "train",
    "generate", "export", "serve", "plan", "studio",
)  # fmt: skip
MOST_ROOMS, MOST_FILES, MOST_LINES, MOST_FUNCTION_LINES = 20, 12, 400, 60


MODULES = {dotted(file): file for file in FILES}


@dataclasses.dataclass
class Outline:
    """A file: its lines, public classes, lines of each function, modules imported.

    Import statements inside functions count, too.
    """

    lines: int
    classes: list[str]
    functions: dict[str, int] = dataclasses.field(default_factory=dict)
    imported: set[str] = dataclasses.field(default_factory=set)


@functools.cache
def outline(file):
    text = file.read_text()
    tree = ast.parse(text)
    classes = [x.name for x in tree.body if isinstance(x, ast.ClassDef)]
    found = Outline(len(text.splitlines()), classes)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno
            found.functions[f"{node.name}:{node.lineno}"] = length
        elif isinstance(node, ast.Import):
            found.imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.imported.update(inner & MODULES.keys() or {node.module})
    return found


def imported(file):
    return outline(file).imported


def room(module):
    return module.split(".")[1]


def test_every_entry_is_a_room_with_a_docstring():
    entries = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert entries - {"__init__.py"} == set(ROOMS)
    assert len(ROOMS) <= MOST_ROOMS
    for init in [*PACKAGE.rglob("__init__.py"), *LAUNCHER.rglob("__init__.py")]:
        assert ast.get_docstring(ast.parse(init.read_text())), init


def test_the_readme_lists_the_rooms_in_their_order():
    table = (ROOT / "README.md").read_text().partition("| room | purpose |")[2]
    cells = re.findall(r"^\|((?: `\w+`)+) \|", table, re.MULTILINE)
    assert re.findall(r"\w+", " ".join(cells)) == [*ROOMS]


def test_no_folder_has_more_files_than_a_reader_can_scan():
    for top in (PACKAGE, LAUNCHER):
        for folder in (top, *(p for p in top.rglob("*") if p.is_dir())):
            count = len(list(folder.glob("*.py")))
            assert count <= MOST_FILES, f"{folder} has {count} files: nest some"


def test_rooms_import_only_rooms_before_them():
    wrong = [
        f"{module} imports {other}"
        for module, file in MODULES.items()
        if file.name != "__main__.py"
        for other in imported(file)
        if other.startswith("research.")
        and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_rooms_about_whole_runs_know_the_whole_config():
    """All others receive the groups of `knob_groups`, or plain arguments."""
    whole = {"config", "tasks", "runs", "train", "plan", "studio"}
    users = {
        room(module)
        for module, file in MODULES.items()
        if "research.config.run_config" in imported(file)
    }
    assert users == whole


def test_nobody_imports_a_door():
    for file in [*FILES, *files_of(LAUNCHER)]:
        assert not [m for m in imported(file) if m.endswith("__main__")], file


def test_imports_have_no_cycle():
    finished = set()

    def visit(module, trail):
        assert module not in trail, f"cycle: {' -> '.join((*trail, module))}"
        if module not in finished:
            for other in imported(MODULES[module]) & MODULES.keys():
                visit(other, (*trail, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_a_name_stands_for_one_thing():
    """No two files, and no two classes, of the whole repository share a name."""
    files, classes = collections.defaultdict(list), collections.defaultdict(list)
    for file in [*FILES, *files_of(LAUNCHER)]:
        if file.name != "__main__.py":
            files[file.name].append(dotted(file))
        for name in outline(file).classes:
            if not name.startswith("_"):
                classes[name].append(dotted(file))
    twice = {k: v for k, v in (files | classes).items() if len(v) > 1}
    assert not twice, twice


def test_research_knows_no_config_launcher_or_test():
    for module, file in MODULES.items():
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & {"configs", "launch", "tests", "conftest"}, module


def test_flax_stays_inside_the_models():
    for module, file in MODULES.items():
        tops = {name.split(".")[0] for name in imported(file)}
        assert "flax" not in tops or room(module) == "models", module


def test_files_and_functions_are_short():
    for file in [*FILES, *files_of(LAUNCHER), *files_of(ROOT / "configs")]:
        found = outline(file)
        assert found.lines <= MOST_LINES, file
        for name, length in found.functions.items():
            assert length < MOST_FUNCTION_LINES, f"{file}: {name}"


OPTIONAL = {"lm_eval", "llguidance"}  # Packages that an install may lack.


def dataclasses_of(module):
    try:
        values = vars(importlib.import_module(module)).values()
    except ModuleNotFoundError as error:
        assert error.name in OPTIONAL, error
        return []
    return [x for x in values if isinstance(x, type) and dataclasses.is_dataclass(x)]


def test_python_3_11_takes_the_default_of_every_field():
    """It refuses a mapping proxy, which later versions take."""
    doors = [module for module in MODULES if module.endswith("__main__")]
    for module in MODULES.keys() - doors:
        for made in dataclasses_of(module):
            for field in dataclasses.fields(made):
                assert not isinstance(field.default, types.MappingProxyType), (
                    f"{made.__name__}.{field.name} of {module} needs a default_factory"
                )


def fixtures_of(file):
    """Functions of a file that a decorator makes a fixture or a chain of commands."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            made = " ".join(map(ast.unparse, node.decorator_list))
            if "fixture" in made or made == "chain":
                yield node.name


def test_no_test_file_replaces_a_fixture_that_all_share():
    """Files of one command would then find another thing under the same name."""
    shared = {
        name
        for file in [ROOT / "tests/conftest.py", *files_of(ROOT / "tests/support")]
        for name in fixtures_of(file)
    }
    assert {"place", "results", "unbroken", "model"} <= shared
    twice = [
        f"{file}: {name}"
        for file in files_of(ROOT / "tests")
        if file.name.startswith("test_")
        for name in fixtures_of(file)
        if name in shared
    ]
    assert not twice, twice


def test_no_test_imports_another_test():
    for file in (ROOT / "tests").rglob("*.py"):
        found = re.search(r"^ *from ([\w.]+\.)?test_\w+ import", file.read_text(), re.M)
        assert not found, f"{file}: {found and found[0]}"


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
from research.config.run_config import Config, MeshConfig
from research.data.token_batch import Batch
from research.models.presets import PRESETS
from research.models.transformer import Model
from research.parallel import mesh
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train.step import optimizers, train_step
from research.weights import trainable

config = Config()
model = Model(PRESETS["tiny"])
split = trainable.make(config.trainable, config.model, config.lora, model.specs)
definition = train_step.StepDefinition(
    model,
    split,
    optimizers.make_optimizer(config.optim, config.steps, split.specs),
    mesh.make_mesh(MeshConfig(), jax.devices()[:1]),
    CrossEntropy(groups=1, chunk=8),
)
frozen = {p: jax.ShapeDtypeStruct(s.shape, "bfloat16") for p, s in model.specs.items()}
ids = jax.ShapeDtypeStruct((1, 2, 16), "int32")
weights = jax.ShapeDtypeStruct((1, 2, 16), "float32")
batch = Batch(ids, ids, weights, ids, ids, ids)
abstract = train_step.abstract_state(definition)
lowered = train_step.jit_train_step(definition).lower(abstract, frozen, batch)
print(len(lowered.as_text()))
"""


def test_the_core_runs_on_a_bare_accelerator_image():
    """A step is made from jax, flax, optax and numpy alone, late imports included."""
    assert int(run_blocked(("jax.numpy", "flax.nnx", "optax"), CORE_PROGRAM)) > 10_000


def test_adapters_need_no_flax():
    run_blocked(("jax.numpy",), "import research.weights.adapters.lora")


def test_the_blocker_of_this_file_blocks():
    with pytest.raises(AssertionError, match="not part of a bare image"):
        run_blocked(("jax.numpy",), "import flax")
