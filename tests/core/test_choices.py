"""Each option list is written once; the registries of later rooms have its names."""

import ast
import importlib

import pytest
from source_files import FILES

from research.config import choices
from research.config.choices import KERNELS, OPTIMIZERS, REMATS, SCHEDULES, TASK_MODULES
from research.config.knob_groups import DataConfig, OptimConfig
from research.config.knobs import facts_of, fields
from research.config.run_config import Config
from research.core.errors import UserError
from research.models.attention_kernels import choose
from research.models.transformer import REMAT_POLICIES
from research.train.step.optimizers import DIRECTIONS
from research.train.step.schedules import make_schedule
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
