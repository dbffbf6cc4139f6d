"""Paths that users write: the home folder, and addresses that are none."""

import argparse
import dataclasses
import importlib
import json
import re
from pathlib import Path

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
from research.config.run_config import Config, DataConfig, TextConfig
from research.config.saved_config import differences, from_json
from research.core.errors import UserError
from research.core.local_paths import expanded, local_path
from research.data.instructions.instruction_dataset import load_dataset
from research.data.instructions.row_files import row_files
from research.data.instructions.row_selection import find_rows
from research.data.text.text_sources import open_sources
from research.formats.base_model import Base, open_architecture
from research.generate.prompt_file import read_prompts
from research.plan.plan_json import check_json
from research.runs.run_directory import RunDir
from research.tasks.task_registry import rows_of_files
from research.tokenize.tokenizer_training import byte_tokenizer


def test_a_tilde_is_the_home_folder_wherever_a_path_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.jsonl").write_text("")
    assert local_path("~/x") == tmp_path / "x"
    assert (
        row_files("~/a b.jsonl") == row_files("~/*.jsonl") == [tmp_path / "a b.jsonl"]
    )
    (tmp_path / "b.jsonl").write_text("")
    assert row_files("~/b.jsonl,~/a b.jsonl")[1] == tmp_path / "a b.jsonl"
    check_json("~/plan.json")
    (tmp_path / "c.py").write_text(
        "from research.config import defaults\ndef get_config():\n"
        "    config = defaults()\n    config.steps = 7\n    return config\n"
    )
    assert load_config_file("~/c.py").steps == 7


FETCHED = {
    "gs://bucket/run": "gcsfuse, or .* gcloud storage cp -r gs://bucket/run FOLDER",
    "s3://b/x": "mount-s3, or .* aws s3 cp --recursive s3://b/x FOLDER",
    "az://b/x": "mount the storage",
    "https://h/x.csv": "curl -LO https://h/x.csv",
    "https://github.com/some/repo/tree/main/x": "git clone https://github.com/some/repo,",
    "https://github.com/o/r/blob/main/d/x.json": "LO https://github.com/o/r/raw/main/d/x",
    "file:///data/x": "write the path alone",
}


@pytest.mark.parametrize("written", FETCHED)
def test_an_address_where_a_folder_is_needed_says_how_its_files_are_fetched(written):
    for use in (RunDir, local_path, row_files, check_json):
        with pytest.raises(UserError, match=f"{written}, an .*{FETCHED[written]}"):
            use(written)


PAGE = "https://huggingface.co/"
PAGES = {
    # The page of a model, of a dataset, and what is to be written.
    f"{PAGE}lab/tiny": ("write hub://lab/tiny$", "it is a model, and a dataset is"),
    f"{PAGE}lab/tiny/tree/v2": ("write hub://lab/tiny@v2$", "it is a model"),
    f"{PAGE}lab/tiny/blob/main/a.gguf": ("hf download lab/tiny a.gguf --l", "a model"),
    "hf.co/gpt2?local=1": ("write hub://gpt2$", "it is a model"),
    f"{PAGE}datasets/lab/rows/": ("it is a dataset, and a model", "write hub://lab/rows$"),
    f"{PAGE}datasets/rows/viewer": ("it is a dataset", "write hub://rows$"),
    f"{PAGE}datasets/lab/rows/viewer/sub/test?row=3": (
        "it is a dataset", "write hub://lab/rows:sub@test$",
    ),
    f"{PAGE}datasets/lab/rows/resolve/v2/a/x.csv": (
        "it is a dataset",
        "hf download lab/rows a/x.csv --repo-type dataset --revision v2 --local-dir F",
    ),
    "hf://datasets/lab/rows@v2": ("it is a dataset", "write hub://lab/rows@v2$"),
    "hub:/lab/tiny": ("write hub://lab/tiny$", "write hub://lab/tiny$"),
    "hub://datasets/lab/rows": ("it is a dataset", "write hub://lab/rows$"),
}  # fmt: skip


@pytest.mark.parametrize("written", PAGES)
def test_a_page_of_the_hub_is_answered_with_the_address_to_write(tmp_path, written):
    of_model, of_rows = PAGES[written]
    with pytest.raises(UserError, match=of_model):
        open_architecture(written)
    with pytest.raises(UserError, match=of_rows):
        find_rows(DataConfig(path=written))
    with pytest.raises(UserError, match=of_rows):
        open_sources(TextConfig(sources=(f"a={written}",)), DataConfig())
    with pytest.raises(UserError, match="hf download"):
        RunDir(written)


def test_a_missing_file_is_named_by_its_knob_with_the_nearest_beside_it(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text("")
    asked, near = str(tmp_path / "mine" / "row.json"), tmp_path / "mine" / "rows.jsonl"
    said = f" does not exist (did you mean '{near}'?); "
    base = Base("b", None, byte_tokenizer(), None)
    text = Config(data=DataConfig(kind="text"), text=TextConfig(sources=("a=b",)))
    rows = DataConfig(path=str(near), eval_path=asked, template="dolly")
    near.write_text('{"instruction": "q", "response": "a"}\n' * 20)
    for named, use in {
        f"config.data.path={asked}": lambda: find_rows(DataConfig(path=asked)),
        f"config.data.eval_path={asked}": lambda: load_dataset(
            rows, 0, None, TextConfig()
        ),
        f"--data={asked}": lambda: rows_of_files(Config(data=rows), base, asked),
        f"text source row={asked} of --data": lambda: rows_of_files(text, base, asked),
        f"--prompts={asked}": lambda: next(read_prompts(Path(asked))),
    }.items():
        with pytest.raises(UserError) as found:
            use()
        assert named in str(found.value) and said in str(found.value)


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
    *("--axis", "--metric"),
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
