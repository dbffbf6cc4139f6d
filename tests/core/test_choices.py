"""Each option list is written once; the registries of later rooms have its names."""

import ast
import collections
import functools
import importlib
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY
from rich.console import Console
from source_files import FILES

from research.config import choices
from research.config.choices import KERNELS, OPTIMIZERS, REMATS, SCHEDULES, TASK_MODULES
from research.config.data_knobs import DataConfig
from research.config.knob_groups import LoRAConfig, ModelConfig, OptimConfig
from research.config.knobs import facts_of, fields
from research.config.run_config import Config
from research.core.errors import UserError, look_up
from research.data.instructions.row_cache import UnitBuild
from research.data.instructions.row_selection import find_rows, refuse_row
from research.data.row_readers import BadRowError
from research.data.text import document_readers
from research.data.text.row_layout import RowLayout
from research.models.attention_kernels import choose
from research.models.parts.expert_kernels import choose_expert_kernel
from research.models.transformer import REMAT_POLICIES
from research.plan.estimate import memory_formulas
from research.report.progress_view import ProgressView
from research.runs.lineage import hub_pins
from research.tasks import task_registry
from research.tokenize.chat_template import written_template
from research.train.run_saver import RunSaver
from research.train.step.optimizers import DIRECTIONS, make_optimizer
from research.train.step.schedules import make_schedule
from research.weights import trainable
from research.weights.adapters.adapter_registry import find_kind
from research.weights.representations.frozen_base_format import find_format

LISTS = [x for x in vars(choices).values() if isinstance(x, tuple)]


def test_registries_have_the_names_of_the_knobs():
    assert set(DIRECTIONS) == set(OPTIMIZERS)
    assert set(REMAT_POLICIES) == set(REMATS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_one_of_its_own(name):
    config = OptimConfig(schedule=name, warmup=0.1, decay=0.2)
    others = [OptimConfig(schedule=x, warmup=0.1, decay=0.2) for x in SCHEDULES]
    rates = [float(make_schedule(config, 100)(step)) for step in (15, 70, 95)]
    same = [
        x.schedule
        for x in others
        if rates == [float(make_schedule(x, 100)(step)) for step in (15, 70, 95)]
    ]
    assert same == [name]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_known_where_it_is_chosen(kernel):
    try:
        choose(kernel, "cpu", dtype="float32", head_dim=64, length=128)
    except UserError as error:
        assert "cannot work here" in str(error)


def test_every_kind_of_task_is_a_module():
    for module in TASK_MODULES.values():
        importlib.import_module(module)


def test_every_kind_of_adapter_and_format_of_weights_is_found():
    for name in choices.ADAPTER_MODULES:
        assert find_kind(name).name == name
    for name in choices.BASE_FORMAT_MODULES:
        find_format(name)


def unheard_config(path, **more):
    """The group of a knob whose value is none of its choices."""
    group = functools.reduce(getattr, path.split(".")[:-1], Config(**more))
    object.__setattr__(group, path.rpartition(".")[2], "unheard")
    return group


def as_run(path):
    config = Config()
    object.__setattr__(config, path.split(".")[0], unheard_config(path))
    return config


def text_reader(**policies):
    source = types.SimpleNamespace(is_folder=True, column="text", **policies)
    return document_readers._DocumentReader(source, collections.Counter(), None)


def abstract_layers():
    devices = np.array([types.SimpleNamespace(platform="cpu")])
    mesh = types.SimpleNamespace(shape={"tensor": 1, "expert": 1}, devices=devices)
    definition = types.SimpleNamespace(mesh=mesh)
    return types.SimpleNamespace(architecture=TINY, definition=definition)


BAD_ROW = BadRowError("wrong type", "rows:1", "it is a number")
# By knob with choices: all that depends on its value, given one that it does not know.
DISPATCHES = {
    "trainable": [
        lambda c: trainable.make("unheard", ModelConfig(), LoRAConfig(), {}),
    ],
    "model.quantize": [lambda c: find_format("unheard")],
    "model.remat": [
        lambda c: memory_formulas.kept_per_token(abstract_layers(), "unheard"),
        lambda c: look_up(REMAT_POLICIES, "unheard", "config.model.remat"),
    ],
    "model.attention": [
        lambda c: choose("unheard", "cpu", dtype="float32", head_dim=64, length=128),
    ],
    "model.expert_kernel": [lambda c: choose_expert_kernel("unheard", "cpu")],
    "lora.kind": [lambda c: find_kind("unheard")],
    "data.kind": [lambda c: task_registry.find_kind(as_run("data.kind"))],
    "data.source": [
        find_rows,
        lambda c: hub_pins.resolve_addresses(as_run("data.source"), {}, asking=False),
    ],
    "data.template": [
        lambda c: written_template("unheard", types.SimpleNamespace(chat_template="")),
    ],
    "data.overlength": [lambda c: UnitBuild(Path(), c, None, {}, set())],
    "data.bad_lines": [
        lambda c: refuse_row(BAD_ROW, c),
        lambda c: text_reader(bad_lines="unheard")._stops_at_bad_rows(),
    ],
    "text.undecodable": [
        lambda c: text_reader(undecodable="unheard")._keep("notes:1", "no UTF-8"),
    ],
    "text.cut": [lambda c: RowLayout.of(c, DataConfig(), None, None)],
    "optim.name": [lambda c: make_optimizer(c, 10, {})],
    "optim.schedule": [lambda c: make_schedule(c, 10)],
    "checkpoint.on_error": [
        lambda c: RunSaver(
            types.SimpleNamespace(config=types.SimpleNamespace(checkpoint=c)),
            *(None, None, None, None),
        ),
    ],
    "runtime.progress": [lambda c: ProgressView(Console(), "unheard", 0, 1)],
}


def test_each_knob_with_choices_has_its_dispatches_listed():
    listed = {path for path, field, _ in fields(Config()) if facts_of(field).choices}
    assert DISPATCHES.keys() == listed - {"model.dtype", "model.param_dtype"}


@pytest.mark.parametrize(
    "path, dispatch",
    [(path, each) for path, found in DISPATCHES.items() for each in found],
)
def test_a_name_that_only_a_list_knows_falls_through_nowhere(path, dispatch):
    with pytest.raises(UserError, match=f"config.{path} is 'unheard'") as raised:
        dispatch(unheard_config(path))
    *_, field = [f for p, f, _ in fields(Config()) if p == path]
    for name in set(facts_of(field).choices) - {choices.AUTO}:
        assert name in str(raised.value)


def test_no_option_list_is_written_twice():
    """A tuple, list or set of three or more of a knob's names stands in one place."""
    known = [set(x) for x in LISTS]
    known += [set(facts_of(f).choices) for _, f, _ in fields(Config())]
    places = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                names = [getattr(x, "value", None) for x in node.elts]
                for each in known:
                    if len(each) > 2 and each <= set(names):
                        places.setdefault(tuple(sorted(each)), set()).add(
                            (str(file), node.lineno)
                        )
    assert places, "the lint sees no list at all"
    assert [x for x in places.values() if len(x) > 1] == []


def test_a_name_added_to_an_open_list_is_a_choice(monkeypatch):
    """A registry of a later room extends a knob without an edit in `config`."""
    with pytest.raises(UserError, match="instructions, text"):
        Config(data=DataConfig(kind="pairs"))
    monkeypatch.setitem(TASK_MODULES, "pairs", "somewhere")
    assert Config(data=DataConfig(kind="pairs")).data.kind == "pairs"
