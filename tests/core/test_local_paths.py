"""Paths that users write: the home folder, and addresses that are none."""

import argparse
import dataclasses
import importlib
import json
import re

import pytest
from source_files import PACKAGE

from launch import __main__ as launch_door
from launch.jobs.launch_flags import LaunchParser
from launch.jobs.launch_job import LaunchJob
from launch.report import __main__ as report_door
from launch.sweep import __main__ as sweep_door
from research.config import command_line
from research.config.config_file import load_config_file
from research.config.knobs import changed, facts_of, fields, flat
from research.config.run_config import Config
from research.config.saved_config import differences, from_json
from research.core.errors import UserError
from research.core.local_paths import expanded, local_path
from research.data.instructions.row_files import row_files
from research.plan.plan_json import check_json
from research.runs.run_directory import RunDir


def test_a_tilde_is_the_home_folder_wherever_a_path_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.jsonl").write_text("")
    assert local_path("~/x") == tmp_path / "x"
    assert (
        row_files("~/a b.jsonl") == row_files("~/*.jsonl") == [tmp_path / "a b.jsonl"]
    )
    assert row_files("~/no.jsonl,~/a b.jsonl")[1] == tmp_path / "a b.jsonl"
    check_json("~/plan.json")
    (tmp_path / "c.py").write_text(
        "from research.config import defaults\ndef get_config():\n"
        "    config = defaults()\n    config.steps = 7\n    return config\n"
    )
    assert load_config_file("~/c.py").steps == 7


@pytest.mark.parametrize("written", ["gs://bucket/run", "s3://b/x", "https://h/x"])
def test_an_address_where_a_folder_is_needed_is_refused(written):
    for use in (RunDir, local_path, row_files, check_json):
        with pytest.raises(UserError, match=f"{written}, an address .*mount"):
            use(written)


@pytest.mark.parametrize("knob", ["data.path", "data.eval_path"])
@pytest.mark.parametrize("rows", ["a.jsonl,hub://o/n", "hub://o/n:x, b", "hub://o/n,"])
def test_a_list_with_a_dataset_of_the_hub_is_refused_by_name(knob, rows):
    """Before the hub is asked; a subset, too, could be written with a comma."""
    changes = {"data.path": "a.jsonl", knob: rows}
    with pytest.raises(UserError, match=rf"{re.escape(rows)}.*no hub:// in it"):
        changed(Config(), changes, "here")
    assert changed(Config(), {knob: "hub://o/n:x@y"}, "here")


# Help of a flag that names a file or folder of this machine speaks of one of these.
PLACE = re.compile(r"\b(folders?|files?|directory|path|text to train on)\b")
# The help of these does, too, and they take none.
NO_PATHS = {
    *("export", "replace_export", "lora.targets", "data.source", "text.column"),
    *("replace", "dtype", "column", "--dry-run", "--image", "--name"),
}


def flag_groups():
    """The group of flags of each door of `research`."""
    for file in sorted(PACKAGE.rglob("__main__.py")):
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        module = importlib.import_module(name)
        for value in vars(module).values():
            if dataclasses.is_dataclass(value) and value.__name__.endswith("Flags"):
                yield value


def check_marked(name, help, is_path):
    assert is_path == (bool(PLACE.search(help)) and name not in NO_PATHS), (
        f"{name} ({help}): mark a flag that takes a path, or add it to NO_PATHS"
    )


def test_each_knob_that_takes_a_path_knows_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for path, field, value in fields(Config()):
        check_marked(path, facts_of(field).help, facts_of(field).is_path)
        if facts_of(field).is_path:
            written = ("a=~/x", "b=y") if isinstance(value, tuple) else "~/x, ~/y,z"
            found = flat(changed(Config(), {path: written}, "here"))
            expected = {str: "/home/me/x, /home/me/y,z", tuple: ("a=/home/me/x", "b=y")}
            assert found[path] == expected[type(value)], path


def test_each_flag_of_a_door_that_takes_a_path_knows_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    groups = list(flag_groups())
    assert len(groups) >= 7
    seen = set()
    for group in groups:
        for field in dataclasses.fields(group):
            facts = facts_of(field)
            check_marked(field.name, facts.help, facts.is_path)
            if facts.is_path:
                argument = f"--{field.name}=~/x"
                if field.default == ():
                    argument = f"--{field.name}=name=~/x"
                found = command_line.parse(["door", argument], "", group)
                assert "/home/me/x" in str(getattr(found, field.name)), field.name
                seen.add(field.name)
    assert seen >= {"run", "out", "json", "runs", "source"}


def test_each_flag_of_a_launch_that_takes_a_path_knows_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found, seen = [launch_door.make_parser()], set()
    monkeypatch.setattr(
        LaunchParser, "parse_args", lambda self, *_, **__: found.append(self) or 1
    )
    for call in (
        lambda: report_door.main(["report"]), lambda: sweep_door.parse([])
    ):  # fmt: skip
        with pytest.raises(AttributeError):  # Nothing was parsed.
            call()
    for parser in found:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()
            for name in action.option_strings[-1:]:
                check_marked(name, action.help or "", action.type is expanded)
                seen.add(name)
    assert seen >= {"--sweep", "--folder", "--zone", "--nodes"}


def test_a_run_that_was_begun_with_a_tilde_is_the_same_run(tmp_path, monkeypatch):
    """Its config of before has it as written; a job lies beside its folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    old = json.dumps({"run_dir": "~/run", "data": {"path": "~/rows.jsonl"}})
    config = from_json(old, tmp_path / "run")
    assert config.data.path == str(tmp_path / "rows.jsonl")
    assert differences(old, config, tmp_path / "run") == {}
    assert LaunchJob.of_run([], config).file(".log") == tmp_path / "run.log"


def test_the_home_of_nobody_is_refused_where_it_is_used():
    with pytest.raises(UserError, match="no-such-user"):
        local_path("~no-such-user/x")
    config = from_json('{"data": {"path": "~no-such-user/x"}}', PACKAGE)
    assert config.data.path == "~no-such-user/x"
