"""Names that people bring from other trainers are explained, and never accepted."""

import re
import shlex
import tomllib

import pytest
from absl import flags
from ml_collections import config_flags

from research.config.command_line import NoFlags, parse_with_config
from research.config.field_names import FILE, explain, names_of_others
from research.config.knobs import build, changed, flat
from research.config.run_config import Config, defaults
from research.core.errors import UserError

KNOBS = flat(Config())
WRITTEN = tomllib.loads(FILE.read_text())
TYPED = """
lr learning_rate num_epochs num_train_epochs per_device_train_batch_size
per_device_eval_batch_size gradient_accumulation_steps max_seq_length output_dir
lora_r lora_alpha lora_dropout target_modules bf16 fp16 tf32 gradient_checkpointing
load_in_4bit load_in_8bit report_to model model_name_or_path base_model dataset
train_file max_steps warmup_ratio warmup_steps weight_decay max_grad_norm
lr_scheduler_type save_steps eval_steps logging_steps resume_from_checkpoint packing
chat_template val_set_size cutoff_len push_to_hub deepspeed fsdp use_flash_attention_2
sequence_len micro_batch_size base_output_directory finetuning_type optim
save_total_limit remat_policy
"""
UNLIKE = "foo bar xyzzy temperature flavour beam text eval rope vocab world"


@pytest.fixture
def refused(tmp_path):
    file = tmp_path / "own_config.py"
    file.write_text(
        "from research.config import defaults\n\n"
        "def get_config():\n    config = defaults()\n    return config\n"
    )

    def call(*flags, line=""):
        text = file.read_text().replace("    return", f"    {line}\n    return")
        file.write_text(text)
        with pytest.raises(UserError) as raised:
            parse_with_config(["door", f"--config={file}", *flags], "", NoFlags)
        return str(raised.value)

    return call


def test_the_table_names_knobs_and_no_name_twice():
    listed = [*WRITTEN["same"].values(), *WRITTEN["converted"], *WRITTEN["absent"]]
    names = " ".join(listed).split()
    assert len(names) == len(set(names)) == len(names_of_others()) > 40
    for name, (knob, how) in names_of_others().items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert not knob or knob in KNOBS, (name, knob)
        assert knob or how, name
        for path in re.findall(r"config\.([\w.]+\w)", how):
            assert any(f"{x}.".startswith(f"{path}.") for x in KNOBS), (name, path)


@pytest.mark.parametrize("name", str.split(TYPED))
def test_a_name_of_another_trainer_is_explained_however_it_is_typed(name, refused):
    dashes = name.replace("_", "-")
    said = {
        refused(f"{start}=7").partition(" is called ")[2]
        or refused(f"{start}=7").partition(" does not exist here: ")[2]
        for start in (f"--{name}", f"--{dashes}", f"-{name}", f"--config.{dashes}")
    }
    assert len(said) == 1 and len(said.pop()) > 30
    knob, how = names_of_others().get(name, ("", ""))
    if not how and name not in KNOBS:
        assert f"--config.{knob or 'optim.' + name}=" in refused(f"--{name}=7")


# How the other trainers write the values of a knob; "3" for the rest.
TYPICAL = {
    "run_dir": ("outputs/a-b",),
    "steps": ("1000", "-1"),
    "optim.learning_rate": ("2e-4", "5e-05", "1.0e-5"),
    "optim.warmup": ("0.03", "0"),
    "optim.clip_norm": ("1.0", "0"),
    "optim.weight_decay": ("0.01", "0."),
    "optim.b1": ("0.9",),
    "optim.b2": ("0.999",),
    "optim.eps": ("1e-8",),
    "optim.z_loss": ("1e-4",),
    "lora.dropout": ("0.05", "0"),
    "lora.targets": (
        "q_proj,v_proj",
        "q_proj v_proj",
        "all-linear",
        "['q_proj', 'v_proj']",
        '["q_proj", "v_proj"]',
        ".*proj",
    ),
    "data.system": ("You are helpful.", "it's $5"),
    "epochs": ("3", "3.0", "0.5"),
    "data.held_out": ("0.05", "500", "0"),
    "mesh.data": ("-1",),
}


COLUMNS = ("instruction", "response", "messages", "text")  # Their own names.
LENGTH = (("--config.steps=-1",), ())


def pasted(written):
    """The config after absl has parsed these flags."""
    values = flags.FlagValues()
    argv = ["door", *written]
    config_flags.DEFINE_config_dict(
        "config", defaults(), flag_values=values, sys_argv=argv
    )
    values(argv)
    return flat(build(Config, values["config"].value.to_dict(), "config"))


def test_what_is_printed_can_be_pasted():
    """For all names whose value means the same: what other trainers take parses."""
    for turn in range(max(map(len, TYPICAL.values()))):
        printed = {}
        for knob, names in WRITTEN["same"].items():
            texts = TYPICAL.get(knob, ("column" if KNOBS[knob] in COLUMNS else "3",))
            said = {
                explain(name, KNOBS, texts[turn % len(texts)]) for name in names.split()
            }
            (printed[knob],) = shlex.split(said.pop().partition("called ")[2])[:1]
            assert not said and printed[knob].startswith(f"--config.{knob}=")
        # Only one of them says how long the run is.
        printed.pop(("steps", "epochs")[turn % 2])
        arrived = pasted([*printed.values(), *LENGTH[turn % 2]])
        for knob in printed:
            assert arrived[knob] != "" and type(arrived[knob]) is type(KNOBS[knob])
        targets = arrived["lora.targets"]
        assert all(re.fullmatch(r"[\w.*-]+", each) for each in targets), targets


def test_a_share_of_the_run_and_a_word_of_another_trainer_are_explained(refused):
    """Their trainers read 0.1 steps as a share and `all` as every linear layer."""
    for given, said in {
        "eval_steps=0.1": "config.eval.every here: a number of steps; a share",
        "save_steps=0.2": "config.checkpoint.every here: a number of steps; a share",
        "lora_target=all": "config.lora.targets here: all is 'all-linear'",
    }.items():
        assert said in refused(f"--{given}")


def test_several_names_are_explained_at_once(refused):
    said = refused("--lora_r", "8", "--lr=1e-4", "--packing", "--bf16=True")
    _, *lines, _ = said.split("\n")
    assert [line.split()[0] for line in lines] == [
        *("--lora_r", "--lr", "--packing", "--bf16")
    ]
    assert "--config.lora.rank=8" in lines[0] and "1e-4" in lines[1]
    assert "does not exist here: rows are always packed" in lines[2]


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--config.optim.lr=1", "--config.optim.learning_rate=1"),
        ("--config.optim.rank=8", "--config.lora.rank=8"),
        ("--config.chekpoint.every=9", "--config.checkpoint.every=9"),
        ("--every=9", "--config.eval.every=9 or --config.checkpoint.every=9"),
        ("--config.optim.scedule=wsd", "did you mean 'optim.schedule'?"),
        (
            "--gradient_acumulation_steps=4",
            "did you mean 'gradient_accumulation_steps'",
        ),
    ],
)
def test_a_name_in_the_wrong_place_or_mistyped(flag, said, refused):
    assert said in refused(flag)


@pytest.mark.parametrize("word", str.split(UNLIKE))
def test_below_a_likeness_nothing_is_suggested(word, refused):
    assert explain(word, KNOBS) == " is not a knob"
    assert f"--{word} is not a knob; --help" in refused(f"--{word}=3")


def test_config_files_sweeps_and_help_explain_names_too(refused):
    said = refused(line="config.optim.lr = 1e-4")
    assert "own_config.py:5: 'lr' is called config.optim.learning_rate here" in said
    with pytest.raises(UserError, match=r"an axis: 'lora_r' is called config\.lora"):
        changed(Config(), {"lora_r": 8}, "an axis")
    with pytest.raises(UserError, match=r"warmup_steps is called config\.optim"):
        parse_with_config(["door", "--help=warmup_steps"], "", NoFlags)


def test_values_of_flags_are_no_names(refused):
    assert "lora.rank is -3" in refused("--config.lora.rank", "-3")
