"""Names that people bring from other trainers are explained, and never accepted."""

import re
import shlex
import tomllib

import pytest

from research.config.command_line import NoFlags, parse_with_config
from research.config.field_names import FILE, explain, names_of_others
from research.config.knobs import changed, flat
from research.config.run_config import Config
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


def test_what_is_printed_can_be_pasted(refused):
    """For all names whose value means the same; the value arrives in the knob."""
    for knob, names in WRITTEN["same"].items():
        wanted = {str: "a", int: "3", float: "0.25", tuple: "q_proj,v_proj"}
        value = wanted[type(KNOBS[knob])]
        for name in names.split():
            said = refused(f"--{name}", value).partition("called ")[2]
            path, _, given = shlex.split(said)[0].partition("=")
            assert path == f"--config.{knob}"
            assert given == value or eval(given) == ("q_proj", "v_proj")


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
