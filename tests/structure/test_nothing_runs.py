"""Nothing that comes with data, weights or a tokenizer is ever run."""

import ast
import json
import pickle
import re
import shutil

import pytest
import tiny_model
from source_files import FILES, LAUNCHER, files_of

from research.config.run_config import DataConfig
from research.core.errors import UserError
from research.data.instructions.row_selection import load_rows
from research.formats.base_model import open_base
from research.tokenize.chat_template import ChatFormat
from research.tokenize.conversation import Record, Turn

BANNED_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve",
    "marshal", "torch", "yaml",
}  # fmt: skip
BANNED_CALLS = {
    "eval", "exec", "builtins.eval", "builtins.exec", "compile", "__import__",
    "os.system", "os.popen",
}  # fmt: skip
# All of Jinja that may be named: what renders in the sandbox, its errors, what a tag of
# our own is made of, and what finds the templates of pages.
JINJA = {
    "jinja2.sandbox.ImmutableSandboxedEnvironment", "jinja2.TemplateError",
    "jinja2.TemplateSyntaxError", "jinja2.ext.Extension", "jinja2.nodes.CallBlock",
    "jinja2.FileSystemLoader", "jinja2.StrictUndefined",
}  # fmt: skip
ROOMS_OF_JINJA = {"jinja2.sandbox", "jinja2.ext", "jinja2.nodes"}


def offences(source):
    """Yield the parts of a program that could run the files it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("jinja2.") and name not in ROOMS_OF_JINJA | JINJA:
                yield name
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS:
                yield name
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell"):
                    yield from [f"{keyword.arg}={value}"] * (value != "False")


def imports(node):
    """Yield an import's banned names, and aliases that would hide one."""
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            module, name = node.module, f"{node.module}.{alias.name}"
        else:
            module = name = alias.name
        if module.split(".")[0] in BANNED_MODULES or name in BANNED_CALLS:
            yield name
        hidden = alias.asname or isinstance(node, ast.ImportFrom)
        if name.split(".")[0] == "jinja2" and hidden and name not in JINJA:
            yield name


def test_the_package_has_nothing_that_runs_what_it_reads():
    for file in [*FILES, *files_of(LAUNCHER)]:
        text = file.read_text()
        found = list(offences(text))
        if file.parent.name == "targets":  # Manifests are written, and none is read.
            assert not re.search(r"yaml\.\w*(load|parse|Loader)", text), file
            found = [name for name in found if name != "yaml"]
        assert found == [], file


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import torch.serialization",
        "import yaml",
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "os.system('ls')",
        "f(trust_remote_code=True)",
        "np.load(x, allow_pickle=flag)",
        "subprocess.run(x, shell=True)",
        "jinja2.Template(text)",
        "from jinja2 import Environment",
        "from jinja2 import Environment as Sandboxed",
        "from jinja2 import environment",
        "from jinja2 import sandbox",
        "from jinja2.sandbox import SandboxedEnvironment",
        "from jinja2.nativetypes import NativeEnvironment",
        "import jinja2.sandbox as safe",
        "import jinja2 as j",
        "make = jinja2.Environment",
        "jinja2.environment.Template(text)",
        "jinja2.sandbox.SandboxedEnvironment()",
        "from os import system",
        "from builtins import eval",
    ],
)
def test_the_lint_of_this_file_sees(source):
    assert list(offences(source))


def test_the_lint_lets_ordinary_code_be():
    assert not list(offences("re.compile(x); f(trust_remote_code=False); a.eval()"))
    assert not list(offences("import jinja2.sandbox; from jinja2 import TemplateError"))


@pytest.fixture
def canary(tmp_path):
    """A path that is never made, whatever a test opens."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something that was only data has run"


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.fixture
def model_dir(tmp_path):
    return tiny_model.make_tiny_model(tmp_path / "model")


def test_the_bomb_of_this_file_goes_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"]
)
def test_pickled_rows_are_refused(tmp_path, canary, name):
    (tmp_path / name).write_bytes(pickle.dumps([Bomb(canary)]))
    with pytest.raises(UserError, match=name):
        load_rows(DataConfig(path=str(tmp_path / name)), 0)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.yaml", "rows.py"])
def test_files_of_kinds_that_run_are_refused(tmp_path, canary, name):
    (tmp_path / name).write_text(f"!!python/object/apply:os.mkdir ['{canary}']")
    with pytest.raises(UserError, match="unknown kind"):
        load_rows(DataConfig(path=str(tmp_path / name)), 0)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickled_weights_are_refused(model_dir, canary, name):
    (model_dir / "model.safetensors").unlink()
    (model_dir / name).write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(UserError):
        base = open_base(str(model_dir))
        [base.tensors.read(key) for key in base.tensors.names]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(model_dir, canary, file):
    """`auto_map` is refused or ignored; the module beside it is not imported."""
    found = json.loads((model_dir / file).read_text())
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    found["auto_map"] = dict.fromkeys(kinds, "bomb.Bomb")
    (model_dir / file).write_text(json.dumps(found))
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Bomb: pass\n"
    (model_dir / "bomb.py").write_text(code)
    try:
        base = open_base(str(model_dir))
    except UserError:
        return
    assert base.tokenizer.encode_texts(["a"])


ESCAPES = (
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ cycler.__init__.__globals__.os.mkdir({path!r}) }}}}",
    "{{{{ self.__init__.__globals__ }}}}",
    "{{{{ messages.append(1) }}}}",
    "{{% include '/etc/passwd' %}}",
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_stays_in_its_sandbox(model_dir, canary, escape):
    file = model_dir / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    text = escape.format(path=str(canary))
    settings["chat_template"] = tiny_model.CHATML + text
    file.write_text(json.dumps(settings))
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    with pytest.raises(UserError):
        chat = ChatFormat(open_base(str(model_dir)).tokenizer, "chat", "")
        chat.encode(Record(turns, "", "", "x:1"))


def test_code_in_a_row_is_text(tmp_path, canary, model_dir):
    text = f"{{{{ ''.__class__ }}}} __import__('os').mkdir({str(canary)!r}) $(touch x)"
    row = {"instruction": text, "response": text}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (record,) = load_rows(DataConfig(path=str(tmp_path / "rows.jsonl")), 0).records()
    tokenizer = open_base(str(model_dir)).tokenizer
    encoded = ChatFormat(tokenizer, "chat", "").encode(record)
    assert tokenizer.decode(encoded.ids).count(text) == 2
    shutil.rmtree(model_dir)
