"""Where a config does not fit, the flags that are named are enough, and all needed.

A search ranks by speed, so a flag is also needed if the step is slower without it.
"""

import dataclasses
import functools
import json
import re
import shlex

import pytest
from commands import ROOT
from doors import run_door
from plan_helpers import big_config

from configs import finetune_8b
from launch.jobs import fit_check
from research.config.field_names import flag
from research.config.knobs import changed, flat
from research.config.run_config import Config, MeshConfig, from_config_dict
from research.core.errors import UserError
from research.models.presets import PRESETS
from research.plan import fit_advice, planned_devices, planner
from research.plan.__main__ import main
from research.plan.layout_search import search, slowness
from research.plan.planned_devices import local_device, parse_device
from research.report import plan_tables


@pytest.fixture(autouse=True, scope="module")
def each_plan_once():
    """Several tests try the same configs; a plan depends on no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "plan_estimate", functools.cache(planner.plan_estimate))
        yield


def read_flags(text, config):
    """The knobs that a sentence sets, each of its own type."""
    own = flat(config)
    found = re.findall(r"--config\.([\w.]+)=([\w-]+)", text)
    kinds = {bool: lambda value: value == "True", int: int, str: str}
    return {knob: kinds[type(own[knob])](value) for knob, value in found}


TIGHT = {
    "one card": ("lora", {}, "24GB", "llama3.1-8b"),
    "long rows": ("lora", {"seq": 32768}, "24GB", "llama3.1-8b"),
    "too many weights": ("full", {"remat": "none"}, "l4:2", "llama3.2-3b"),
    "copies": ("lora", {"mesh": MeshConfig(data=-1)}, "16GB:8", "mistral-7b"),
    "few rows": ("lora", {"rows": 4, "seq": 16384}, "12GBx4", "llama3.1-8b"),
}


def tight(kind, more, device, preset):
    config = dataclasses.replace(
        big_config(kind, **{"rows": 8, **more}), trainable=kind
    )
    config = changed(config, {"model.init_from": "hub://o/n"}, "")
    return config, PRESETS[preset], parse_device(device)


@pytest.mark.parametrize("name", TIGHT)
def test_the_flags_make_it_fit_and_each_of_them_is_needed(name):
    config, shape, target = tight(*TIGHT[name])
    plan = planner.plan_estimate(config, shape, target)
    assert not plan.fits
    advice = fit_advice.advise(plan, shape, config)
    assert advice.fits and advice.words.startswith("it fits with --config.")
    knobs = read_flags(advice.words.partition(" (")[0], config)
    made = planner.plan_estimate(changed(config, knobs, ""), shape, target)
    assert made.fits and made.needed == advice.plan.needed
    for group in {"mesh." if "mesh" in knob else knob for knob in knobs}:
        rest = {k: v for k, v in knobs.items() if not k.startswith(group)}
        try:
            less = planner.plan_estimate(changed(config, rest, ""), shape, target)
        except UserError:
            continue  # Axes of a mesh and rows of a pass are set together.
        assert not less.fits or slowness(less, config) > slowness(made, config), group


@pytest.mark.parametrize("name", TIGHT)
def test_a_plan_gives_the_flags_that_a_search_ranks_first(name):
    """From its own config, and from any other layout that does not fit."""
    config, shape, target = tight(*TIGHT[name])
    plan = planner.plan_estimate(config, shape, target)
    first = search(config, shape, target).plans[0]
    advice = fit_advice.advise(plan, shape, config)
    assert first.fits == (not advice.costs)
    if first.fits:
        assert advice.flags == fit_advice.flags_between(config, first.config)
    else:
        assert fit_advice.advise(first, shape, config).words == advice.words


def test_flags_of_an_advice_can_be_pasted_into_a_shell():
    knobs = {"lora.targets": ("q_proj", "v_proj"), "data.path": "my rows.jsonl"}
    config = Config(trainable="lora")
    flags = fit_advice.flags_between(config, changed(config, knobs, ""))
    assert shlex.split(flags) == [flag(*each) for each in knobs.items()]


def test_knobs_that_change_the_training_come_last_and_say_so():
    assert fit_advice.advise(*_plan("one card")).costs == ()
    long = fit_advice.advise(*_plan("long rows")).words
    assert "data.seq_len=8192" in long and "rows are cut shorter" in long
    many = fit_advice.advise(*_plan("too many weights")).words
    assert "trainable=lora" in many and "adapters are trained" in many
    assert "; the same training fits l4:" in many.partition("(")[2]


def test_a_single_pass_is_tried_too_because_it_sums_no_gradients():
    config = big_config("full", rows=16, micro=8)
    shape, target = PRESETS["llama3.2-3b"], parse_device("38GBx2")
    plan = planner.plan_estimate(config, shape, target)
    assert not plan.fits
    advice = fit_advice.advise(plan, shape, config)
    assert advice.flags == "--config.data.microbatch_size=16" and advice.fits


def _plan(name):
    config, shape, target = tight(*TIGHT[name])
    return planner.plan_estimate(config, shape, target), shape, config


def test_where_nothing_fits_the_least_and_the_chips_that_hold_it_are_named():
    config, shape, target = tight("lora", {}, "16GB", "llama3.1-8b")
    advice = fit_advice.advise(
        planner.plan_estimate(config, shape, target), shape, config
    )
    assert not advice.fits
    least, holds = advice.words.split("; the same training fits ")
    said = re.match(
        r"nothing fits 16GB:1: it needs at least ([\d.]+) GiB of 13.7 GiB "
        r"\(15.0 GiB of it frozen weights\), with ", least
    )  # fmt: skip
    knobs = read_flags(least, config)
    made = planner.plan_estimate(changed(config, knobs, ""), shape, target)
    assert not made.fits and f"{made.needed / 2**30:.1f}" == said[1]
    memory = re.search(r"takes a chip of (\d+) GB", least)[1]
    assert planner.plan_estimate(
        changed(config, knobs, ""), shape, parse_device(f"{memory}GB")
    ).fits
    device = holds.split(",")[0]
    assert device == "16GB:2"
    same = changed(config, read_flags(holds, config), "")
    assert planner.plan_estimate(same, shape, parse_device(device)).fits
    assert (same.data.seq_len, same.trainable) == (2048, "lora")


def test_a_compiler_that_needs_more_than_the_estimate_is_believed():
    config, shape, target = tight(*TIGHT["one card"])
    plan = planner.plan_estimate(config, shape, target)
    alone = fit_advice.advise(plan, shape, config)
    compiled = dataclasses.replace(
        plan, source="refused", memory=None, needed=1.2 * plan.needed
    )
    told = fit_advice.advise(compiled, shape, config)
    assert told.fits and 1.2 * told.plan.needed <= plan.limit < 1.2 * alone.plan.needed


def test_the_chips_that_hold_a_config_do_not_depend_on_the_layout_of_a_search():
    config, shape, _ = tight("full", {"rows": 32, "micro": 16}, "l4", "llama3.2-3b")
    laid = {"mesh.data": 1, "data.microbatch_size": 1, "model.remat": "full"}
    searched = changed(config, laid, "")
    one, two = parse_device("l4"), parse_device("l4:2")
    plans = [planner.plan_estimate(config, shape, two)]
    plans += [planner.plan_estimate(searched, shape, one)]
    held = [fit_advice.advise(plan, shape, config).holds for plan in plans]
    assert held[0].plan.target == held[1].plan.target
    assert held[0].flags == held[1].flags


@pytest.mark.parametrize("sizes", [(32, 16), (32, 0), (128, 16), (96, 2)])
def test_rows_that_do_not_divide_over_the_chips_get_flags_that_do(sizes):
    rows, micro = sizes
    config = big_config("lora", rows=rows, micro=micro)
    shape, target = PRESETS["llama3.1-8b"], parse_device("h100:64")
    with pytest.raises(UserError, match="use a multiple of 64, as ") as caught:
        planner.plan_estimate(config, shape, target)
    knobs = read_flags(str(caught.value), config)
    assert planner.plan_estimate(changed(config, knobs, ""), shape, target).fits


def test_plan_search_and_launch_give_one_advice():
    flags = (f"--config={ROOT}/configs/finetune_8b.py", "--preset=llama3.1-8b")
    ask = functools.partial(run_door, main, ROOT, "plan", *flags, "--device=16GB")
    plan, search = ask(), ask("--search")
    assert (plan.returncode, search.returncode) == (1, 1), plan.stderr + search.stderr
    config = from_config_dict(finetune_8b.get_config())
    with pytest.raises(UserError) as caught:
        fit_check.require_fit(config, "16GB", preset="llama3.1-8b")
    (advice,) = re.findall(r"nothing fits 16GB:1: .*", plan.stdout)
    assert advice in str(caught.value) and advice in search.stdout


def test_several_chips_are_planned_in_one_command(tmp_path):
    config, file = f"--config={ROOT}/configs/finetune_dolly.py", tmp_path / "plan.json"
    chips = "--device=h100, nope,v5e:1x1,24GB"
    done = run_door(main, ROOT, "plan", config, chips, f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    known = [x["target"] for x in found]
    assert known == ["h100:1", "nope", "v5e:1x1", "24GB:1"]
    assert [x.get("fits") for x in found] == [True, None, True, True]
    assert "'nope' is none of" in found[1]["problem"]
    for target in known:
        assert re.search(rf"^ *{target} ", done.stdout, re.MULTILINE), done.stdout
    rows = plan_tables.tabulate_devices(found, [None, None, 2.0, None])
    hours = f"{2 * found[2]['best']['chip_hours']:.2g}"
    assert hours in rows[3][7] and rows[1][7] == "-" and len({*map(len, rows)}) == 1
    done = run_door(main, ROOT, "plan", config, chips, "--search")
    assert done.returncode == 2 and "name one" in done.stderr


def test_the_chips_of_this_machine_are_known_without_opening_them(fake, monkeypatch):
    assert local_device() == "cpu"
    fake("nvidia-smi")
    card = "NVIDIA H100 80GB HBM3\n"
    fake.answer("nvidia-smi", "--query-gpu=name", out=2 * card, times=1)
    fake.answer("nvidia-smi", "--query-gpu=name", out="NVIDIA Unknown\n", times=1)
    fake.answer("nvidia-smi", "--query-gpu=name", code=9, out="no driver")
    assert local_device() == "h100:2"
    with pytest.raises(UserError, match="are NVIDIA Unknown: name their kind"):
        local_device()
    assert local_device() == "cpu"
    fake._answers("nvidia-smi").unlink()
    fake.answer("nvidia-smi", "--query-gpu=name", wait=600)
    monkeypatch.setattr(planned_devices, "ANSWERING", 0.2)
    with pytest.raises(UserError, match=r"nvidia-smi has not named .* in 0\.2 s"):
        local_device()


def test_the_readme_answers_whether_8b_fits_24_gb():
    text = (ROOT / "README.md").read_text()
    command = r"^    \.venv/bin/python -m research\.plan (.*--device=24GB)\n"
    block = re.search(command + r"((?:      .*\n)+)", text, re.MULTILINE)
    done = run_door(main, ROOT, "plan", *block[1].split())
    shown = [line.strip() for line in block[2].splitlines()]
    assert done.returncode == 1 and len(shown) <= 6
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    for line in shown:
        assert line in lines, done.stdout
    (flags,) = re.findall(r"it fits with (--config\S+)", block[2])
    done = run_door(main, ROOT, "plan", *block[1].split(), flags)
    assert done.returncode == 0 and "fits: " in done.stdout
