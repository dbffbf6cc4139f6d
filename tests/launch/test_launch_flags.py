"""Flags of the launcher: none counts twice, whatever the target."""

import argparse

import pytest
from source_files import ROOT

from launch import targets
from launch.__main__ import make_parser
from launch.report.__main__ import main as report
from launch.sweep.__main__ import parse
from launch.sweep.sweep_spec import load
from research.core.errors import UserError

FLAGS = [
    (name, action)
    for name in targets.names()
    for action in make_parser()._subparsers._group_actions[0].choices[name]._actions
    if action.option_strings and action.dest != "help"
]


@pytest.mark.parametrize(
    "target, action", FLAGS, ids=[f"{x}{y.option_strings[0]}" for x, y in FLAGS]
)
def test_a_flag_with_two_values_is_refused_and_one_value_twice_is_not(target, action):
    name = action.option_strings[0]
    values = ("7", "8") if callable(action.type) else ("a", "b")
    values = tuple(action.choices or values)[:2]
    required = [
        f"{other.option_strings[0]}=x"
        for place, other in FLAGS
        if place == target and other.required and other is not action
    ]

    def given(*words):
        return vars(make_parser().parse_args([target, *required, *words]))[action.dest]

    if action.nargs == 0:
        assert given(name, name) is True
    elif isinstance(action, argparse._AppendAction):
        assert given(f"{name}=a", name, "b")[-2:] == ["a", "b"]
    else:
        first, second = values
        for words in (
            [f"{name}={first}", f"{name}={second}"],
            [name, first, name, second],
        ):
            with pytest.raises(
                UserError, match=f"^{name} is given several times, as '"
            ):
                given(*words)
        assert str(given(f"{name}={first}", name, first)) == first


def test_a_time_limit_that_slurm_would_refuse_is_refused_here():
    for limit in ("4h", "4 hours", "1:2:3:4", "-1"):
        with pytest.raises(UserError, match="no time limit of Slurm: write hours:min"):
            make_parser().parse_args(["slurm", f"--time={limit}"])
    for limit in ("90", "90:30", "4:00:00", "1-12", "2-03:30:00", "UNLIMITED"):
        assert make_parser().parse_args(["slurm", f"--time={limit}"]).time == limit


def test_the_config_of_a_sweep_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = ROOT / "configs" / "sweeps" / "lora_rank.py"
    written = load(str(sweep)).config
    assert written == str(ROOT / "configs" / "finetune_dolly.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "finetune_dolly.py").touch()  # This folder comes first.
    assert load(str(sweep)).config == "configs/finetune_dolly.py"


def test_commands_beside_the_launcher_refuse_two_values_too():
    for flag in ("sweep", "seeds", "target"):
        words = ["--sweep=a.py"] * (flag != "sweep")
        words += [f"--{flag}=local", f"--{flag}=slurm"]
        with pytest.raises(UserError, match=f"--{flag} is given several times"):
            parse(words)
    with pytest.raises(UserError, match="--sweep is given several times"):
        report(["report", "--sweep=a", "--sweep=b"])
