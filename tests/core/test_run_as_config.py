"""A run directory stands for its config, and a config for its run directory."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from source_files import ROOT

from research.config.command_line import NoFlags, parse, parse_with_config
from research.config.config_file import call_in_file
from research.config.knobs import knob
from research.config.run_config import Config, DataConfig, LoRAConfig, TextConfig
from research.config.saved_config import to_json
from research.core.errors import UserError
from research.runs.run_directory import RunDir

IDENTITY = {"base model": "b", "tokenizer": "t", "data": "d"}


@dataclasses.dataclass(frozen=True)
class RunFlags:
    run: str = knob("", "run directory")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run in runs/own; a relative path in its config leads to rows beside `runs`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    config = Config(
        run_dir="runs/own",
        accept=("seed",),
        lora=LoRAConfig(rank=4),
        data=DataConfig(path="rows.jsonl"),
        text=TextConfig(column="body"),  # It has no effect, and is old.
    )
    with RunDir(config.run_dir).create(config, IDENTITY, []):
        pass
    return config


def read(*arguments):
    return parse_with_config(["door", *map(str, arguments)], "", NoFlags)[0]


SOURCES = "--config.text.sources=('a=b',)"


@pytest.mark.parametrize("given", ["runs/own", "runs/own/", "runs/own/config.json"])
def test_a_run_directory_stands_for_its_config(config, given, tmp_path):
    found = read(f"--config={given}")
    assert (found.run_dir, found.accept) == ("runs/own", ())
    assert found.data.path == str(tmp_path / "rows.jsonl")
    assert RunDir(found.run_dir).check_config(found) == {}
    other = read(f"--config={given}", "--config.run_dir=runs/b", "--config.seed=3")
    assert (other.run_dir, other.seed, other.lora.rank) == ("runs/b", 3, 4)
    with pytest.raises(UserError, match="no effect"):
        read(f"--config={given}", "--config.text.cache=False")
    with pytest.raises(UserError, match=r"data\.path is '/.*text\.sources takes its"):
        read(f"--config={given}", "--config.data.kind=text", SOURCES)


def test_a_run_resumes_where_it_was_moved_to(config, tmp_path, monkeypatch):
    moved = (tmp_path / "runs" / "own").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    found = read(f"--config={moved}")
    assert found.run_dir == str(moved)
    assert found.data.path == str(tmp_path / "rows.jsonl")
    assert RunDir(found.run_dir).check_config(found) == {}


@pytest.mark.parametrize(
    "files, given, said",
    [
        ({}, ".", "no run directory, because it has no config.json"),
        ({}, "absent", "there is no such file"),
        ({"config.json": "{"}, "config.json", "config.json is of no run"),
        ({"config.json": '{"model_type": "llama"}'}, ".", "init_from=. to research"),
        ({"config.json": "[3]"}, ".", "is of no run"),
        ({"ax.yml": "lr: 1e-4"}, "ax.yml", "no Python file.*copy configs/finetune_dol"),
    ],
)
def test_a_folder_that_is_no_run_is_named(files, given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said) as raised:
        read(f"--config={given}")
    assert str(raised.value).startswith(f"--config={given}: ")


def test_a_model_in_the_place_of_a_run_is_answered_with_its_flag(tmp_path, config):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["A"], "hidden_size": 8}')
    for given in (str(model), f"{model}/config.json", "model.gguf", "hub://a/b"):
        with pytest.raises(UserError, match="--model=") as raised:
            parse(["door", f"--run={given}"], "", RunFlags)
        where = str(model) if given.startswith("/") else given
        assert f"--model={where} to research.generate" in str(raised.value)
    for call in (RunDir(model).config, lambda: RunDir(model).check_config(config)):
        with pytest.raises(
            UserError, match=f"--model={model} .* another run directory"
        ):
            call()


@pytest.mark.parametrize(
    "given, meant", [("runs/owm", "runs/own"), ("fintune", "configs/finetune.py")]
)
def test_a_mistyped_config_gets_the_nearest_file_or_run(given, meant, config):
    Path("configs").mkdir()
    Path("configs", "finetune.py").touch()
    with pytest.raises(UserError, match=f"did you mean --config={meant}\\?"):
        read(f"--config={given}")
    # From another folder, a shipped file is named where it lies.
    with pytest.raises(UserError, match=rf"--config={ROOT}/configs/pretrain_1b\.py\?"):
        read("--config=pretrain_1b.py")
    with pytest.raises(UserError, match=rf"--sweep={ROOT}/configs/sweeps/lora_rank\."):
        call_in_file("--sweep=lora_rnk", "lora_rnk", "sweep")


def test_a_run_is_named_by_its_folder_its_config_or_its_config_file(config, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from research.config import defaults\n\ndef get_config(run='runs/own'):\n"
        "    config = defaults()\n    config.run_dir = run\n    return config\n"
    )
    for given in ("runs/own", "runs/own/config.json", "own.py", "own.py:runs/own"):
        assert parse(["door", f"--run={given}"], "", RunFlags).run == "runs/own"
    absent = parse(["door", "--run=absent"], "", RunFlags)
    assert absent.run == "absent"  # The command says what it lacks.
    assert parse(["door"], "", RunFlags).run == ""


def test_a_refused_difference_is_accepted_by_the_flag_that_is_printed(config):
    (folder := RunDir("runs/own")).path.joinpath("config.json").write_text(
        to_json(dataclasses.replace(config, text=TextConfig()))
    )
    changed = ["--config=runs/own", "--config.data.path=other's.jsonl"]
    changed += ["--config.steps=200", "--config.accept=('seed',)"]
    with pytest.raises(UserError, match=r"data\.path.*\n.*steps") as refused:
        folder.check_config(read(*changed))
    (flag,) = shlex.split(str(refused.value).partition(": add ")[2])
    assert flag == "--config.accept=('data', 'data.path', 'seed', 'steps')"
    accepted = read(*changed[:-1], flag)  # In place of the one that was given.
    assert folder.check_config(accepted).keys() == {"data.path", "steps"}
    other = IDENTITY | {"data": "e"}
    assert folder.check_identity(other, accepted.accept) == {"data": "d -> e"}
    with pytest.raises(UserError, match=r"add --config\.accept=\"\('data', 'seed'\)\""):
        folder.check_identity(other, ("seed",))


def test_the_config_of_a_run_is_of_an_earlier_version(config):
    file = RunDir("runs/own").path / "config.json"
    values = json.loads(file.read_text())
    del values["checkpoint"], values["version"]
    file.write_text(json.dumps(values))
    assert read("--config=runs/own").lora.rank == 4
