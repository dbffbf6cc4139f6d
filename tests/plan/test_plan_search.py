"""The search of the planner: what it takes, and where the compiler knows better."""

import dataclasses
import functools
import io
import json
import math

import pytest
from plan_helpers import EIGHT_B, ONE_B, big_config
from rich.console import Console

from research.core.errors import UserError
from research.plan import layout_search as searching
from research.plan import plan_json, planner
from research.plan.planned_devices import parse_device
from research.report import plan_tables


@pytest.fixture(autouse=True, scope="module")
def each_plan_once():
    """The searches of this file try the same layouts; a plan depends on no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "plan_estimate", functools.cache(planner.plan_estimate))
        yield


def test_search_takes_the_largest_micro_batch_that_fits_and_keeps_the_batch():
    target = parse_device("l4:8")
    config = big_config()
    found = searching.search(config, ONE_B, target)
    assert 1 < len(found.plans) <= searching.SHOWN
    middles = [(p.best.seconds + p.worst.seconds) / 2 for p in found.plans]
    assert middles == sorted(middles)
    for plan in found.plans[:4]:
        assert plan.fits and plan.config.data.batch_size == 64
        assert math.prod(plan.mesh.values()) == 8
        if plan.micro_rows < 64:
            data = dataclasses.replace(
                plan.config.data, microbatch_size=2 * plan.micro_rows
            )
            wider = dataclasses.replace(plan.config, data=data)
            assert not planner.plan_estimate(wider, ONE_B, target).fits


def compiler(target, asked, refused):
    """The first `refused` configs that it compiles need too much memory."""

    def compile_plan(config):
        asked.append(config)
        plan = planner.plan_estimate(config, ONE_B, target)
        needed = 30e9 if len(asked) <= refused else plan.needed
        return dataclasses.replace(plan, source="compiled", needed=needed)

    return compile_plan


def test_a_search_is_shown_from_its_data():
    found = searching.search(big_config(), ONE_B, parse_device("l4:8"))
    plans = json.loads(json.dumps([plan_json.to_json(plan) for plan in found.plans]))
    shown = io.StringIO()
    plan_tables.show_search(Console(file=shown, width=160), plans, found.refused)
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    for plan in plans:
        mesh = " ".join(f"{axis}={n}" for axis, n in plan["mesh"].items())
        start = f"{mesh} {plan['remat']} {plan['microbatch_rows']} "
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1].startswith(f"{found.refused} more")


def test_search_compiles_the_best_and_believes_the_compiler():
    target, asked = parse_device("l4:8"), []
    compile_plan = compiler(target, asked, refused=1)
    found = searching.search(big_config(), ONE_B, target, compile_plan)
    assert len(asked) == searching.COMPILED + 1
    assert [p.source for p in found.plans[:3]] == ["compiled"] * 3
    assert found.plans[0].config == asked[1]
    assert found.plans[-1].config == asked[0] and not found.plans[-1].fits


def test_search_goes_on_where_the_compiler_refuses_the_first():
    target, asked = parse_device("l4:8"), []
    compile_plan = compiler(target, asked, refused=searching.COMPILED)
    plans = searching.search(big_config(), ONE_B, target, compile_plan).plans
    assert len(asked) == 2 * searching.COMPILED
    assert [p.source for p in plans[:3]] == ["compiled"] * 3 and plans[0].fits
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits, reverse=True) and fits.count(False) == 3


def test_search_that_fits_nothing_shows_what_is_nearest():
    found = searching.search(big_config(rows=8), EIGHT_B, parse_device("l4:2"))
    assert len(found.plans) == 1 and not found.plans[0].fits
    with pytest.raises(UserError, match=r"none of .* divides 4 rows"):
        searching.search(big_config(rows=4), EIGHT_B, parse_device("l4:3"))


def test_search_keeps_its_plans_when_the_compiler_refuses_one():
    asked = []

    def compile_plan(config):
        asked.append(config)
        if len(asked) == 2:
            raise UserError("an operation that the compiler does not know")
        plan = planner.plan_estimate(config, ONE_B, parse_device("l4:8"))
        return dataclasses.replace(plan, source="compiled")

    found = searching.search(big_config(), ONE_B, parse_device("l4:8"), compile_plan)
    configs = [plan.config for plan in found.plans]
    assert asked[1] not in configs and {*asked} - {*configs} == {asked[1]}
    assert len(asked) == searching.COMPILED + 1


def test_search_says_what_stands_against_every_layout():
    with pytest.raises(UserError, match=r"none of .*seq_len is 1000000.*context is"):
        searching.search(big_config(seq=1000000), ONE_B, parse_device("l4:8"))
