"""Names that people bring from other trainers are explained, and never accepted."""

import re
import shlex
import tomllib

import pytest
from absl import flags
from ml_collections import config_flags

from research.checkpoints.__main__ import CheckpointsFlags
from research.config.command_line import NoFlags, parse, parse_with_config
from research.config.field_names import (
    FILE,
    explain,
    flags_of_others,
    names_of_others,
)
from research.config.knobs import build, changed, flat
from research.config.run_config import Config, defaults
from research.core.errors import UserError
from research.evaluate.evaluate_flags import EvaluateFlags
from research.export.__main__ import ExportFlags
from research.generate.__main__ import GenerateFlags
from research.plan.__main__ import PlanFlags
from research.runs.__main__ import RequestFlags
from research.serve.__main__ import ServeFlags
from research.tokenize.__main__ import TokenizeFlags

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
# From TRL, transformers, axolotl, LLaMA-Factory, MaxText, torchtune, mlx and litgpt.
TYPED_TOO = """
dataset_config dataset_train_split loss_type activation_offloading eos_token pad_token
lr_scheduler_kwargs optim_args dataloader_drop_last ddp_timeout disable_tqdm log_level
eval_on_start full_determinism auto_find_batch_size remove_unused_columns
save_only_model include_num_input_tokens_seen model_revision max_eval_samples
average_tokens_across_devices roles_to_train train_on_eos special_tokens
excess_length_strategy evals_per_epoch rl lora_model_dir peft_layers_to_transform
wandb_entity dataset_prepared_path rope_scaling cut_cross_entropy dp_shard_size
unfrozen_parameters pretraining_dataset mask_history neat_packing mix_strategy
buffer_size freeze_trainable_layers plot_loss additional_target enable_thinking
use_galore pref_beta tokenized_path tool_format sharding shard_mode mesh_axes
logical_axis_rules dcn_fsdp_parallelism scan_layers vocab_size enable_data_shuffling
optimizer_memory_host_offload jax_cache_dir base_emb_dim profiler max_steps_per_epoch
optimizer_in_bwd lora_attn_modules packed fsdp_cpu_offload column_map iters num_nodes
devices lora_query steps_per_report val_batches grad_checkpoint betas
"""
UNLIKE = "foo bar xyzzy humidity flavour beam text eval rope vocab world"


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


@pytest.mark.parametrize(
    "name, knob",
    [
        ("adapter_name_or_path", "lora.init_from"),
        ("bias", "lora.full"),
        ("init_lora_weights", "lora.kind"),
        ("loftq_config", "lora.kind"),
        ("lr_groups", "optim.rate_pattern"),
        ("modules_to_save", "lora.full"),
        ("pissa_iter", "lora.pissa_niter"),
    ],
)
def test_names_of_adapters_lead_to_the_knobs_that_do_it(name, knob):
    assert names_of_others()[name][0] == knob


def test_names_of_exports_lead_to_the_flags_that_do_it():
    others = flags_of_others()
    for name in ("merge_lora", "adapter_only", "gguf"):
        assert "gguf-adapter" in others[name]["format"]
    for name in ("quantization_method", "quant_type", "quantize"):
        assert "--format=gguf" in others[name]["quant"]
        assert "--quant=q8_0" in others[name][""]


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


def test_what_people_bring_from_seven_tools_has_an_answer():
    names = TYPED_TOO.split()
    assert len(names) > 70
    silent = [name for name in names if explain(name, KNOBS) == " is not a knob"]
    assert not silent and not any("did you mean" in explain(x, KNOBS) for x in names)


# How the other trainers write the values of a knob; "3" for the rest.
TYPICAL = {
    "lora.rslora": ("True",),
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
        ("--config.optim.scedule=wsd", "did you mean --config.optim.schedule=wsd?"),
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


def test_names_without_a_config_or_without_dashes_are_explained(tmp_path, refused):
    """As the command lines of Hugging Face's scripts and of MaxText have them."""
    for given, said in (
        ("--learning_rate=1e-4", "called --config.optim.learning_rate=1e-4 here"),
        ("--model_name_or_path a/b", "is called config.model.init_from here: "),
        ("max_target_length=64", "= is called --config.data.seq_len=64 here"),
        ("lora.rank=4", "is called --config.lora.rank=4 here"),
        ("config=a.py", "config=a.py needs dashes: --config=a.py"),
    ):
        assert said in refused(*given.split())
        with pytest.raises(UserError, match=r"FILE\.py is missing") as raised:
            parse_with_config(["door", *given.split()], "", NoFlags)
        assert said in str(raised.value)
    file = tmp_path / "mine.py"
    file.touch()
    with pytest.raises(UserError, match=f"did you mean --config={file}") as raised:
        parse_with_config(["door", str(file), "steps=9"], "", NoFlags)
    assert "steps= is called --config.steps=9 here" in str(raised.value)


def test_values_of_flags_are_no_names(refused):
    assert "lora.rank is -3" in refused("--config.lora.rank", "-3")


DOORS = (
    CheckpointsFlags, EvaluateFlags, ExportFlags, GenerateFlags, PlanFlags,
    RequestFlags, TokenizeFlags,
)  # fmt: skip
OF_DOORS = [
    (GenerateFlags, "model_name_or_path=x", "--model here: a folder or a .gguf"),
    (GenerateFlags, "max-tokens=50", "--max_new_tokens=50 here"),
    (GenerateFlags, "max-new-tokens=50", "--max_new_tokens=50 here"),
    (GenerateFlags, "adapter_name_or_path=x", "--run here: a run directory of"),
    (GenerateFlags, "system_prompt=a b", "--system='a b' here"),
    (GenerateFlags, "num_return_sequences=2", "--n=2 here"),
    (GenerateFlags, "stop_sequences=a b", "--stop='a b' here"),
    (
        GenerateFlags,
        "config.data.columns.instruction=q",
        "called --prompt_column=q here",
    ),
    (GenerateFlags, "prompt_file=x", "--prompts here: a file with a prompt on each"),
    (GenerateFlags, "batch_size=4", "--slots here: answers that are made at a time"),
    (GenerateFlags, "typical_p=4", "not exist here: answers are chosen by --temperatu"),
    (EvaluateFlags, "top_k=3", "not exist here: it is a flag of research.generate"),
    (ServeFlags, "load_in_8bit", "--weights here: int8 holds"),
    (ServeFlags, "load_in_4bit", "does not exist here: weights are read as they"),
    (ServeFlags, "max_model_len=512", "--context here: tokens of a prompt and its"),
    (ServeFlags, "served-model-name=x", "does not exist here: a model has the name of"),
    (ServeFlags, "api_key=5", "--api_key_file here: a file of keys"),
    (ServeFlags, "max_num_seqs=5", "--slots here"),
    (ServeFlags, "top_p=0.5", "does not exist here: it is a flag of research.generate"),
    (ServeFlags, "humidity=0.5", "is not a flag"),
    (ServeFlags, "gpu_memory_utilization=0.9", "set XLA_CLIENT_MEM_FRACTION in the"),
    (ServeFlags, "allowed-origins=*", "does not exist here: pages of other origins"),
    (
        EvaluateFlags,
        "num_fewshot=5",
        "python -m research.evaluate.harness --run=RUN -- ",
    ),
    (ServeFlags, "stop=x", "does not exist here: it is --stop of research.generate"),
    (
        GenerateFlags,
        "load_in_4bit",
        "does not exist here: weights are read as they",
    ),
    (GenerateFlags, "tensor_parallel_size=2", "does not exist here: all visible dev"),
    (GenerateFlags, "lora_r=8", "--config.lora.rank=8 in research.train, and is no f"),
    (GenerateFlags, "tempereture=1", "did you mean 'temperature'?"),
    (EvaluateFlags, "model_name_or_path=x", "--model here: a folder or a"),
    (EvaluateFlags, "test_file=x.jsonl", "--data=x.jsonl here"),
    (EvaluateFlags, "per_device_eval_batch_size=8", "--slots here: answers that are"),
    (EvaluateFlags, "limit=8", "--rows=8 here"),
    (ExportFlags, "output_dir=out", "--out=out here"),
    (ExportFlags, "torch_dtype=half", "--dtype here: float32, bfloat16 or float16"),
    (ExportFlags, "push_to_hub", "does not exist here: nothing is uploaded"),
    (CheckpointsFlags, "save_total_limit=3", "--keep_last=3 here"),
    (RequestFlags, "stop", "is written without dashes: stop"),
    (RequestFlags, "timeout=3", "--wait=3 here"),
    (PlanFlags, "gpus=8", "--device here: chips to plan for"),
    (PlanFlags, "model=llama3.1-8b", "--preset here: a name of"),
    (PlanFlags, "lr=1", "--config.optim.learning_rate=1 here"),
    (TokenizeFlags, "vocab_size=100", "--vocab=100 here"),
]


def test_no_flag_of_a_command_is_said_to_be_missing_from_all():
    """A flag that a command gains is no longer one that none has."""
    for door in (EvaluateFlags, GenerateFlags, ServeFlags):
        for name in door.__dataclass_fields__.keys() - {"json", "jsonl"}:
            absent = flags_of_others().get(name, {}).get("", "")
            assert not absent or "research.generate" in absent, (name, absent)


def test_the_table_of_flags_names_flags_that_some_command_has():
    from launch.__main__ import make_parser

    known = {
        name for door in (*DOORS, ServeFlags) for name in door.__dataclass_fields__
    }
    help_of_all = [
        reader.format_help()
        for reader in make_parser()._subparsers._group_actions[0].choices.values()
    ]
    words = re.findall(r"--([\w-]+)", " ".join(help_of_all))
    known |= {word.replace("-", "_") for word in words} | {"sweep", "together"}
    for name, named in flags_of_others().items():
        assert re.fullmatch(r"[a-z0-9_.]+", name)
        assert named.keys() <= known | {""}, (name, named)


@pytest.mark.parametrize("door, flag, said", OF_DOORS)
def test_every_command_explains_the_names_of_other_tools(door, flag, said, refused):
    with pytest.raises(UserError) as raised:
        if door is PlanFlags:
            parse_with_config(["door", "--config=configs/x.py", f"--{flag}"], "", door)
        parse(["door", f"--{flag}"], "", door)
    assert f"--{flag.partition('=')[0]}" in str(raised.value)
    assert said in str(raised.value)


@pytest.mark.parametrize("door", DOORS)
def test_no_command_guesses_below_a_likeness(door):
    for word in UNLIKE.split():
        if word not in door.__dataclass_fields__:
            with pytest.raises(UserError) as raised:
                parse(["door", f"--{word}=3"], "", door)
            assert "did you mean" not in str(raised.value), raised.value


def test_a_name_and_a_value_without_dashes_are_explained(refused):
    assert "lr= is called --config.optim.learning_rate=1 here" in refused("lr=1")
    assert "--config.seed=4" in refused("config.seed=4")
    with pytest.raises(UserError, match="prompt=hi needs dashes: --prompt=hi"):
        parse(["door", "prompt=hi"], "", GenerateFlags)
    with pytest.raises(UserError, match=r"did you mean --config=base\.yml\?"):
        parse_with_config(["door", "base.yml", "lr=1"], "", NoFlags)


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("text.source=/a/b", "text.sources=\"('b=/a/b',)\""),  # And then data.source.
        ("data.sources=a", "data.source=a or --config.text.sources="),  # Either.
        ("eval.text_prompt=Hi", "eval.text_prompts=\"('Hi',)\""),
        ("eval.max_tokens=3", "eval.max_new_tokens=3"),
        ("text.columns=body", "text.column=body"),  # Not the group data.columns.
        ("optim.lr=0.1", "optim.learning_rate=0.1"),  # An alias of the same group.
        ("text.seq_len=8", "data.seq_len=8"),  # Nothing in the group is like it.
    ],
)
def test_the_group_that_is_typed_wins_over_the_last_name(typed, meant, refused):
    assert f" --config.{meant}" in refused(f"--config.{typed}").removeprefix("--config")


def test_a_name_with_two_meanings_is_told_both(refused):
    said = refused("--max_tokens=60")
    assert "config.data.seq_len" in said and "config.eval.max_new_tokens" in said
