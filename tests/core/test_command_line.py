"""Doors: flags of their own, help that is complete, errors that say where."""

import dataclasses
import importlib
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from research.config import command_line
from research.config.command_line import parse, parse_with_config
from research.config.cross_knob_rules import ACTS, RULES, conditions_of
from research.config.help_text import full_help
from research.config.knobs import facts_of, fields, flat, knob
from research.config.run_config import Config
from research.config.saved_config import differences, to_json
from research.core.errors import UserError

ROOT = Path(__file__).parents[2]
DOORS = sorted(p.parent.name for p in (ROOT / "research").glob("*/__main__.py"))
KNOBS = {path: (field, value) for path, field, value in fields(Config())}
GOOD = """
from research.config import defaults

def get_config(rank="8"):
    config = defaults()
    config.lora.rank = int(rank)
    return config
"""
PRETRAINS = """
from research.config import defaults

def get_config():
    config = defaults()
    config.trainable = "full"
    config.model.init_from = ""
    config.model.preset = "tiny"
    config.data.kind = "text"
    config.text.sources = ("a=notes.txt",)
    config.text.tokenizer = "byte"
    return config
"""


@dataclasses.dataclass(frozen=True)
class ExampleFlags:
    verb: str = knob("look", "what to do", choices=("look", "jump"))
    name: str = knob("", "name of it")
    often: int = knob(1, "how often", low=1, high=9)
    share: float = knob(0.5, "share of it", above=0)
    quick: bool = knob(False, "hurry")
    also: tuple[str, ...] = knob((), "more of them")
    colour: str = knob("red", "colour of it", choices=("red", "green"))
    note: str | None = knob(None, "a note, or none")


@pytest.fixture(autouse=True)
def same_sigterm():
    """Doors that train set a handler, which must not stay in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "example_config.py"

    def write(text):
        file.write_text(text)
        return str(file)

    return write


def said_by(capsys, call, *arguments):
    with pytest.raises(SystemExit) as ended:
        call(["door", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_flags_have_the_types_of_their_fields():
    given = "--name=a jump --often=3 --share=2 --quick --also=x --also=y --note="
    found = parse(["door", *given.split()], "", ExampleFlags)
    assert found == ExampleFlags("jump", "a", 3, 2.0, True, ("x", "y"), "red", "")
    assert parse(["door"], "", ExampleFlags) == ExampleFlags()


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--nam=a", "nam"),
        ("--often=many", "often.*many"),
        ("--often=0", "--often is 0; it must be in 1 to 9"),
        ("--often=10", "--often is 10; it must be in 1 to 9"),
        ("--share=0", "--share is 0.0; it must be greater than 0"),
        ("--share=nan", "--share is nan"),
        ("--colour=grren", "red, green.*did you mean 'green'"),
        ("run", "unexpected argument 'run'.*look, jump"),
        ("--config=x.py", "config"),
        ("--often=4.5", "often.*this is no whole number: '4.5'"),
    ],
)
def test_a_wrong_flag_is_one_user_error(argument, said):
    with pytest.raises(UserError, match=said):
        parse(["door", argument], "", ExampleFlags)


@pytest.mark.parametrize(
    "given, said",
    [
        (("--config.seed=1", "--config.seed", "2"), "--config.seed .*'1' and '2'"),
        (("--config.export", "--noconfig.export"), "export .*'True' and 'False'"),
        (("--config=other.py",), r"--config is given several times.* and 'other\.py'"),
        (("--often=2", "--often=3"), "--often .*'2' and '3'"),
    ],
)
def test_a_flag_with_two_values_is_refused(given, said, config_file):
    command = ["door", f"--config={config_file(GOOD)}"]
    with pytest.raises(UserError, match=said):
        parse_with_config([*command, *given], "", ExampleFlags)
    if "--often=2" in given:
        with pytest.raises(UserError, match=said):
            parse(["door", *given], "", ExampleFlags)
    twice = ["--config.seed=3", "--config.seed=03", "--often=2", "--often", "2"]
    twice += [
        "--config.export",
        "--config.export=true",
        command[1].replace("=/", "=/./"),
    ]
    twice += ["--config.optim.eps=1e-4", "--config.optim.eps=.0001"]
    config, options = parse_with_config([*command, *twice], "", ExampleFlags)
    assert (config.seed, config.export, options.often) == (3, True, 2)


def test_flags_of_a_file_are_flags_of_the_command(config_file, tmp_path):
    command = ["door", f"--config={config_file(GOOD)}"]
    (tmp_path / "flags").write_text("# mine\n--config.seed=7\n--often=3\n")
    given = [*command, f"--flagfile={tmp_path}/flags"]
    config, options = parse_with_config(given, "", ExampleFlags)
    assert (config.seed, options.often) == (7, 3)
    with pytest.raises(UserError, match="seed is given several times, as '7' and '8'"):
        parse_with_config([*given, "--config.seed=8"], "", ExampleFlags)
    (tmp_path / "flags").write_text("--lr=1e-4\n")
    with pytest.raises(
        UserError, match=r"--lr is called --config\.optim\.learning_rate"
    ):
        parse_with_config(given, "", ExampleFlags)
    for reads in (parse_with_config, parse):
        with pytest.raises(UserError, match=r"^--flagfile: .*No such file.*'/missing'"):
            reads(["door", "--flagfile", "/missing"], "", ExampleFlags)


def test_a_negative_number_is_no_flag(config_file):
    command = ["door", f"--config={config_file(GOOD)}", "--lr", "-1"]
    with pytest.raises(UserError, match=r"^--lr is called [^\n]* here; --help lists"):
        parse_with_config(command, "", ExampleFlags)


def test_a_launcher_sets_a_flag_of_the_user_again():
    given = ["--config=a.py", "--config.run_dir", "x", "--noconfig.export", "--c", "y"]
    later = ["--config.export=true", "--config.run_dir=z"]
    assert command_line.last_of_each([*given, *later]) == (
        *("--config=a.py", "--c", "y", "--config.export=true", "--config.run_dir=z"),
    )


@pytest.mark.parametrize(
    "flag, ready",
    [
        ("text.sources=/a b/n.txt", "text.sources=\"('n=/a b/n.txt',)\""),
        ("text.sources=/a/b,d=/c", "text.sources=\"('b=/a/b', 'd=/c')\""),
        ("data.columns.ignored=a,b c", "data.columns.ignored=\"('a', 'b c')\""),
        ("lora.targets=q_proj v_proj", "lora.targets=\"('q_proj', 'v_proj')\""),
        ("eval.text_prompts=Oh, a dog", "eval.text_prompts=\"('Oh, a dog',)\""),
    ],
)
def test_a_list_that_is_none_is_written_ready_to_paste(flag, ready, config_file):
    with pytest.raises(UserError) as raised:
        command = ["door", f"--config={config_file(GOOD)}", f"--config.{flag}"]
        parse_with_config(command, "", ExampleFlags)
    assert str(raised.value) == f"--config.{flag} is no list: write --config.{ready}"


def test_a_flag_of_a_length_replaces_the_length_of_the_file(config_file):
    steps, epochs = (
        GOOD.replace("return config", f"config.{knob} = 2\n    return config")
        for knob in ("steps", "epochs")
    )

    def length(text, *arguments):
        command = ["door", f"--config={config_file(text)}", *arguments]
        config, _ = parse_with_config(command, "", ExampleFlags)
        return config.steps, config.epochs

    assert length(steps, "--config.epochs=3") == (-1, 3.0)
    assert length(epochs, "--config.steps=9") == (9, 0.0)
    with pytest.raises(UserError, match="only one of them says how long"):
        length(steps, "--config.epochs=3", "--config.steps=9")


def test_a_config_and_its_overrides(config_file):
    exports = "config.export = True\n    return config"
    file = config_file(GOOD.replace("return config", exports))
    overrides = ("--config.lora.targets=('mlp',)", "--noconfig.export", "--quick")
    config, found = parse_with_config(
        ["door", f"--config={file}", *overrides], "", ExampleFlags
    )
    assert (config.lora.rank, config.lora.targets) == (8, ("mlp",))
    assert not config.export and found.quick
    # A second call in the same process knows nothing of the first.
    config, found = parse_with_config(["d", "--config", f"{file}:4"], "", ExampleFlags)
    assert (config.lora.rank, config.lora.targets) == (4, Config().lora.targets)
    assert config.export and not found.quick


@pytest.mark.parametrize(
    "text, line, said",
    [
        (GOOD.replace("int(rank)", "1 / 0"), 6, "ZeroDivisionError"),
        (GOOD.replace("lora.rank", "lora.rnak"), 6, "rnak.*rank"),
        (GOOD.replace("int(rank)", "'four'"), 6, "rank is four .str.; it must be int"),
        (GOOD.replace("get_config(", "get_config("[:-1]), 4, "SyntaxError"),
        (GOOD.replace("import", "imports"), 2, "SyntaxError"),
        (GOOD.replace("config import", "confg import"), 2, "ModuleNotFoundError"),
        (GOOD.replace("get_config", "got_config"), 1, "get_config.. is missing"),
        (GOOD.replace("return config", "return 3"), 4, "returns int"),
        (GOOD.replace("return config", ""), 4, "returns NoneType.*`return config`"),
        (GOOD.replace("import defaults", "import nothing"), 2, "ImportError"),
        (GOOD.replace("lora.rank =", "lerning_rate ="), 6, "'optim.learning_rate'"),
        (
            GOOD.replace("lora.rank =", "evry ="),
            6,
            "'eval.every' or 'checkpoint.every'",
        ),
        (
            GOOD.replace("int(rank)", "8,"),
            6,
            r"\(8,\) \(tuple\); it must be int; .*comma",
        ),
        (GOOD.replace("int(rank)", "exit()"), 6, "SystemExit"),
        (GOOD.replace("int(rank)", "eval('1 +')"), 6, "SyntaxError"),
        (GOOD.replace("config.lora.rank", "config.optm.x"), 6, "'optm'.*mean 'optim'"),
        (GOOD.replace("int(rank)", "config.optm.b"), 6, "'optm'.*mean 'optim'"),
        (
            GOOD.replace(
                "config.lora.rank = int(rank)",
                "class Mute(BaseException):\n        __str__ = None\n    raise Mute",
            ),
            8,
            "Mute: .its text cannot be made",
        ),
        # These fail only after the file has been read.
        (
            GOOD.replace("config.lora.rank", "config.data").replace(
                "int(rank)", "None"
            ),
            6,
            "config.data is None; it must be a group",
        ),
        (GOOD.replace("int(rank)", "10**5000"), 6, "config.lora.rank has .* bits"),
        (GOOD.replace("int(rank)", "None"), 6, "config.lora.rank is None"),
        (GOOD.replace("int(rank)", "-1"), 6, "config.lora.rank is -1"),
        (
            GOOD.replace("config.lora.rank", "config.unlock()\n    config.lora.rnak"),
            7,
            "config.lora.rnak is not a knob .did you mean 'rank'",
        ),
    ],
)
def test_a_config_that_fails_is_one_line_with_file_and_line(
    config_file, text, line, said
):
    file = config_file(text)
    with pytest.raises(UserError, match=said) as raised:
        parse_with_config(["door", f"--config={file}"], "", command_line.NoFlags)
    message = str(raised.value)
    assert "\n" not in message and file in message and len(message) < 400
    assert line is None or f"{file}:{line}: " in message


def test_a_helper_with_wrong_syntax_is_named_itself(config_file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    helper = tmp_path / "a_helper_of_mine.py"
    helper.write_text("x = 1\ndef (:\n")
    file = config_file("import a_helper_of_mine\n" + GOOD)
    with pytest.raises(UserError, match="SyntaxError") as raised:
        parse_with_config(["door", f"--config={file}"], "", command_line.NoFlags)
    assert f"{helper}:2: " in str(raised.value)


@pytest.mark.parametrize(
    "said, name",
    [
        (
            "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'",
            "JAX_ENABLE_X64",
        ),
        (
            'Invalid value "maybe" for JAX flag jax_transfer_guard',
            "JAX_TRANSFER_GUARD",
        ),
    ],
)
def test_a_setting_that_jax_refuses_is_one_line(said, name, monkeypatch, capsys):
    monkeypatch.setenv(name, "maybe")

    def main(argv):
        raise ValueError(said)

    with pytest.raises(SystemExit) as ended:
        command_line.run(main, prints_results=False)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: JAX refuses {name}='maybe'")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flag, said, fix",
    [
        ("text.sources=('a=my.txt',)", "data.kind is 'instructions'", "data.path"),
        ("text.cache=false", "where config.data.kind is 'instructions'", ""),
        (
            "trainable=full",
            "lora.rank is 8.*trainable is 'full' and not 'lora'",
            "",
        ),
        ("model.preset=tiny", "config.model.init_from is 'pkg.*and not ''", ""),
        ("model.param_dtype=bfloat16", "trainable is 'lora' and not 'full'", ""),
        ("optim.decay=0.5", "optim.schedule is 'cosine' and not 'wsd'", ""),
        ("replace_export=True", "config.export is False and not True", ""),
        ("optim.skip_window=64", "config.optim.skip_spread is 0.0", ""),
        ("data.eval_path=test.jsonl", "config.data.path is ''", ""),
        ("eval.text_prompts=('a',)", "data.kind", "eval.prompts takes its place"),
        ("eval.every=4", "no effect where config.data.held_out is 0.0", ""),
        ("eval.prompts=9", "no effect where config.data.held_out is 0.0", ""),
        ("eval.samples_every=4", "where config.data.held_out is 0.0", ""),
        ("eval.answers_every=4", "where config.data.held_out is 0.0", ""),
        ("checkpoint.best_by=bleu", "where config.data.held_out is 0.0", ""),
        ("checkpoint.keep_best=2", "where config.data.held_out is 0.0", ""),
        ("runtime.process_id=1", "config.runtime.distributed is False", ""),
        ("runtime.profile_steps=9", "config.runtime.profile_from is 0", ""),
    ],
)
def test_a_knob_without_effect_is_refused(config_file, flag, said, fix):
    arguments = ["door", f"--config={config_file(GOOD)}", f"--config.{flag}"]
    if "held_out" in said:
        own = ["--config.data.path=a.csv", "--config.data.eval_path=b.csv"]
        for evaluated in ((), own):
            parse_with_config([*arguments, *evaluated], "", command_line.NoFlags)
        arguments.append("--config.data.held_out=0")
    with pytest.raises(UserError, match=said) as raised:
        parse_with_config(arguments, "", command_line.NoFlags)
    message = str(raised.value)
    knob = flag.partition("=")[0]
    remedy = "add --config.lora.rank=16" if "full" in flag else f"drop --config.{knob}"
    assert fix in message and remedy in message and "\n" not in message


@pytest.mark.parametrize(
    "flag, remedy",
    [
        ("data.path=my.txt", """--config.text.sources="('my=my.txt',)" instead"""),
        ("data.columns.response=body", "--config.text.column=body instead"),
    ],
)
def test_a_knob_of_the_other_job_is_named_with_its_value(config_file, flag, remedy):
    with pytest.raises(UserError, match="has no effect where") as raised:
        arguments = ["door", f"--config={config_file(PRETRAINS)}", f"--config.{flag}"]
        parse_with_config(arguments, "", command_line.NoFlags)
    assert remedy in str(raised.value)


@pytest.mark.parametrize(
    "file, off, agrees",
    [
        ("pretrain_tiny", "text.held_out_share=0.0", ()),
        ("finetune_8b", "data.held_out=0", ("eval.prompts=0", "eval.every=0")),
    ],
)
def test_a_flag_turns_off_what_a_file_sets_up(file, off, agrees):
    """Other flags that agree are accepted, and one that contradicts is refused."""

    def parsed(*flags):
        arguments = ["door", f"--config={ROOT}/configs/{file}.py"]
        arguments += [f"--config.{flag}" for flag in (off, *flags)]
        return parse_with_config(arguments, "", command_line.NoFlags)[0]

    assert not parsed().evaluates
    assert parsed(*agrees, "checkpoint.keep_best=0").checkpoint.keep_best == 0
    with pytest.raises(UserError, match=r"drop --config\.eval\.every; or change"):
        parsed("eval.every=3")


def test_off_in_a_file_contradicts_what_else_the_file_sets(config_file):
    lines = "config.data.held_out = 0.0\n    config.eval.every = {}\n    return config"
    for every in (0, 7):
        file = config_file(GOOD.replace("return config", lines.format(every)))
        arguments = ["door", f"--config={file}"]
        if not every:
            parse_with_config(arguments, "", command_line.NoFlags)
            continue
        with pytest.raises(UserError, match=r"add --config\.eval\.every=10;"):
            parse_with_config(arguments, "", command_line.NoFlags)


def test_pre_training_reads_no_text_that_nobody_named(config_file):
    text = PRETRAINS.replace('("a=notes.txt",)', "()")
    with pytest.raises(UserError, match=r"config\.text\.sources is \(\)") as raised:
        parse_with_config(
            ["door", f"--config={config_file(text)}"], "", command_line.NoFlags
        )
    assert """--config.text.sources="('mine=my.txt',)";""" in str(raised.value)
    assert "('stdlib=stdlib',) is the text of the running Python" in str(raised.value)


def test_a_config_that_switches_the_job_is_told_all_that_must_go(config_file):
    file = config_file(PRETRAINS)
    config, _ = parse_with_config(["d", f"--config={file}"], "", command_line.NoFlags)
    assert config.text.tokenizer == "byte"
    switched = ["d", f"--config={file}", "--config.data.kind=instructions"]
    switched += ["--config.model.init_from=hub://a/b"]
    with pytest.raises(UserError, match="some knobs would have no effect") as raised:
        parse_with_config(switched, "", command_line.NoFlags)
    added, _, others = str(raised.value).partition(", or add ")[2].rpartition("; ")
    assert others == "or change config.model.init_from and config.data.kind"
    added = shlex.split(added)
    assert [flag.partition("=")[0] for flag in added] == [
        *("--config.model.preset", "--config.text.sources", "--config.text.tokenizer")
    ]
    config, _ = parse_with_config([*switched, *added], "", command_line.NoFlags)
    assert config.text == Config().text


def test_a_run_that_has_idle_knobs_resumes_with_and_without_them(config_file, tmp_path):
    """An earlier version let them pass."""
    flags = [f"--config={config_file(GOOD)}", f"--config.run_dir={tmp_path}/run"]
    idle = "--config.text.column=body"
    with pytest.raises(UserError, match="no effect"):
        parse_with_config(["d", *flags, idle], "", command_line.NoFlags)
    config, _ = parse_with_config(["d", *flags], "", command_line.NoFlags)
    text = dataclasses.replace(config.text, column="body")
    old = dataclasses.replace(config, text=text)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(old))
    same, _ = parse_with_config(["d", *flags, idle], "", command_line.NoFlags)
    assert same == old
    for resumed in (old, config):
        assert differences(to_json(old), resumed, tmp_path / "run") == {}
    with pytest.raises(UserError, match="no effect"):
        other = "--config.text.column=other"
        parse_with_config(["d", *flags, other], "", command_line.NoFlags)


def test_the_conditions_of_knobs_name_knobs_and_their_choices():
    groups = {path.rpartition(".")[0] for path in KNOBS}
    assert ACTS.keys() <= KNOBS.keys() | groups
    for path in KNOBS:
        for condition in conditions_of(path):
            field, value = KNOBS[condition.knob]
            assert path != condition.knob
            for other in (condition, *condition.unless):
                assert other.knob in KNOBS
            for each in condition.values:
                assert type(each) is type(value), (path, condition)
                assert not facts_of(field).refusal(each), (path, condition)


def test_the_path_of_a_config_may_hold_a_colon(tmp_path):
    file = tmp_path / "a:b" / "c.py"
    file.parent.mkdir()
    file.write_text(GOOD)
    for given, rank in ((file, 8), (f"{file}:4", 4)):
        arguments = ["door", f"--config={given}"]
        config, _ = parse_with_config(arguments, "", command_line.NoFlags)
        assert config.lora.rank == rank


def test_a_line_is_not_blamed_for_a_flag(config_file):
    file = config_file(GOOD)
    arguments = ["door", f"--config={file}", "--config.lora.rank=-1"]
    with pytest.raises(UserError, match=r"^config\.lora\.rank is -1"):
        parse_with_config(arguments, "", command_line.NoFlags)


def test_a_missing_config_is_named():
    for arguments, said in (
        ((), "--config=FILE.py"),
        (("--config=no.py",), "no.py"),
    ):
        with pytest.raises(UserError, match=said):
            parse_with_config(["door", *arguments], "", command_line.NoFlags)


def test_help_has_every_knob_with_default_limits_and_meaning():
    text = " ".join(full_help("usage", ExampleFlags, has_config=True).split())
    assert text.startswith("usage --name=")
    for path, (field, value) in KNOBS.items():
        facts = facts_of(field)
        shown = text.partition(f" --config.{path}=")[2]
        limits = ", ".join(facts.choices) or facts.range()
        assert shown and limits in shown.partition(")  ")[0][:400], path
        assert facts.help in shown, path
        assert str(value).strip("()").lower()[:20] in shown.lower()[:60], path
    assert text.index("config.optim: ") < text.index("--config.optim.name")


def test_no_line_of_help_is_wider_than_a_terminal():
    for line in full_help("usage", ExampleFlags, has_config=True).splitlines():
        assert len(line) <= 88, line


@pytest.mark.parametrize("path", KNOBS)
def test_every_knob_can_be_explained(path, capsys):
    def call(argv):
        return parse_with_config(argv, "", ExampleFlags)

    text = said_by(capsys, call, f"--help={path}")
    assert text == said_by(capsys, call, f"--help=config.{path}")
    field, _ = KNOBS[path]
    facts = facts_of(field)
    flowing = " ".join(text.split())
    for part in (f"--config.{path}", facts.help, *facts.choices, facts.range()):
        assert part in flowing
    assert ("must not change" if facts.fixed else "may change") in flowing
    for condition in conditions_of(path):
        assert f"config.{condition.knob} is " in flowing.partition("It acts where")[2]
    for rule in RULES:
        assert (rule.meaning in flowing) == (path in rule.knobs)


def test_help_of_a_group_a_flag_and_a_typo(capsys):
    def call(argv):
        return parse_with_config(argv, "", ExampleFlags)

    group = said_by(capsys, call, "--help=data")
    shown = {path for path in KNOBS if f"--config.{path}=" in group}
    assert shown == {path for path in KNOBS if path.startswith("data.")}
    assert "red, green" in said_by(capsys, call, "--help=colour")
    with pytest.raises(UserError, match=r"did you mean 'optim.schedule'"):
        call(["door", "--help=optim.shedule"])


def test_the_knobs_of_rules_exist():
    for rule in RULES:
        assert set(rule.knobs) <= flat(Config()).keys() and rule.meaning


def test_a_knob_may_not_start_outside_its_own_limits():
    for path, (field, value) in KNOBS.items():
        assert not facts_of(field).refusal(value), path


@pytest.mark.parametrize("door", DOORS)
def test_each_door_answers_help_twice_in_one_process(door, capsys):
    main = importlib.import_module(f"research.{door}.__main__").main
    first = said_by(capsys, main, "--help")
    assert first == said_by(capsys, main, "--help")
    assert first.startswith(f"python -m research.{door} ")


@pytest.mark.parametrize("door", DOORS)
def test_each_door_refuses_twice_in_one_process(door):
    main = importlib.import_module(f"research.{door}.__main__").main
    for _ in range(2):
        with pytest.raises(UserError):
            main(["door", "--no-such-flag"])


def test_all_doors_import_side_by_side_in_any_order_without_jax_or_global_flags():
    orders = [DOORS, DOORS[::-1], random.Random(0).sample(DOORS, len(DOORS))]
    program = """
import importlib, sys
from absl import flags
import absl.logging
before = set(flags.FLAGS)
for door in sys.argv[1:]:
    importlib.import_module(f"research.{door}.__main__")
assert set(flags.FLAGS) == before, set(flags.FLAGS) - before
assert "jax" not in sys.modules, "a door imports JAX before it has read its flags"
"""
    for order in orders:
        subprocess.run([sys.executable, "-c", program, *order], cwd=ROOT, check=True)
