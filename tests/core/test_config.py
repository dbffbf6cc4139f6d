"""Configs are strict: what is not exactly a field of the right type is an error."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from configs import finetune_8b
from research.config import choices, saved_config
from research.config.cross_knob_rules import idle
from research.config.knobs import build, facts_of, fields, flat
from research.config.run_config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    defaults,
    fixed_differences,
    from_config_dict,
)
from research.config.saved_config import (
    CHANGES,
    KnobChange,
    differences,
    from_json,
    to_json,
)
from research.core.errors import UserError

# Where any other value of the same type would not do.
OTHER = {
    "trainable": "full",
    "model.dtype": "float32",
    "model.param_dtype": "bfloat16",
    "model.remat": "dots",
    "model.attention": "splash",
    "model.expert_kernel": "ragged_dot",
    "data.kind": "text",
    "checkpoint.on_error": "go_on",
    "text.undecodable": "skip",
    "text.held_out_share": 0.25,
    "text.cut": "paragraph",
    "text.overlap": 3,
    "optim.name": "muon",
    "optim.schedule": "wsd",
    "data.template": "dolly",
    "data.overlength": "drop",
    "data.bad_lines": "skip",
    "data.microbatch_size": 3,
    "data.held_out": 0.25,
    "data.batch_size": 9,
    "runtime.progress": "lines",
}


# There is one choice yet, so they cannot differ; steps exclude epochs, and training of
# all weights excludes codes and products of bytes.
SINGLE = {
    "data.source", "lora.kind", "epochs", "model.quantize", "model.quantize_paths",
    "model.int8_products",
}  # fmt: skip


def other(path, value):
    """A value that is allowed and not the default."""
    if path in OTHER or path in SINGLE:
        return OTHER.get(path, value)
    if isinstance(value, tuple):
        return (*value, "more=2")
    if isinstance(value, str):
        return value + "ü"
    if isinstance(value, bool):
        return not value
    return value + 2 if isinstance(value, int) else value / 2 + 0.125


def set_in(config, path, value):
    *groups, name = path.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


def changed():
    """A config dict in which no field has its default."""
    config = defaults()
    for path, value in flat(Config()).items():
        set_in(config, path, other(path, value))
    return config


def as_dict(**changes):
    return json.loads(json.dumps(dataclasses.asdict(Config()))) | changes


def test_every_field_round_trips():
    config = from_config_dict(changed())
    for path, default in flat(Config()).items():
        expected = other(path, default)
        assert flat(config)[path] == expected, path
        assert expected != default or path in SINGLE, path
    assert from_json(to_json(config)) == config
    assert from_config_dict(defaults()) == Config() == from_json(to_json(Config()))


def test_a_config_is_frozen_and_its_dict_is_locked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = 3
    with pytest.raises(AttributeError, match="stepz"):
        defaults().stepz = 3
    with pytest.raises(TypeError):
        defaults().steps = "three"


@pytest.mark.parametrize(
    "group, name, near",
    [("", "stepz", "steps"), ("lora", "rnak", "rank"), ("data", "seqlen", "seq_len")],
)
def test_an_unknown_field_names_the_nearest(group, name, near):
    values = as_dict()
    (values[group] if group else values)[name] = 1
    where = f"config.{group}.{name}" if group else f"config.{name}"
    with pytest.raises(UserError, match=rf"{where} is not .*did you mean '{near}'\?"):
        from_json(json.dumps(values))
    config = defaults().unlock()
    set_in(config, f"{group}.{name}" if group else name, 1)
    with pytest.raises(UserError, match=near):
        from_config_dict(config)


@pytest.mark.parametrize("path", flat(Config()))
def test_a_missing_field_is_named(path):
    *groups, name = path.split(".")
    values = inner = as_dict()
    for group in groups:
        inner = inner[group]
    del inner[name]
    where = ".".join(["config", *groups])
    with pytest.raises(UserError, match=rf"^{where} lacks {name}"):
        build(Config, values, "config")
    # The run directory of a version that did not have the knob.
    before = {k: v for change in CHANGES for k, v in change.added.items()}
    expected = before.get(path, flat(Config())[path])
    assert flat(from_json(json.dumps(values)))[path] == expected


WRONG = {
    int: ["8", 8.0, True, None, [8]],
    float: ["0.5", True, None, float("nan"), float("inf")],
    bool: ["True", 1, 0, None],
    str: [8, None, ["x"]],
    tuple: ["mlp", 3, None, [3], [["mlp"]]],
}


@pytest.mark.parametrize("path", flat(Config()))
def test_a_value_of_another_type_is_refused(path):
    values = as_dict()
    for wrong in WRONG[type(flat(Config())[path])]:
        set_in(values, path, wrong)
        with pytest.raises(UserError, match=f"^config.{path} is"):
            from_json(json.dumps(values))


def test_only_whole_numbers_become_floats_and_lists_tuples():
    values = as_dict()
    values["optim"]["learning_rate"] = 1
    values["lora"]["targets"] = ["query"]
    config = from_json(json.dumps(values))
    assert type(config.optim.learning_rate) is float
    assert config.lora.targets == ("query",)


@pytest.mark.parametrize("group", ["lora", "data.columns"])
def test_a_group_must_be_a_group(group):
    values = as_dict()
    set_in(values, group, 3)
    with pytest.raises(UserError, match=f"config.{group} is 3; it must be a group"):
        from_json(json.dumps(values))


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("trainable", "Lora", "lora, full.*did you mean 'lora'"),
        ("model.dtype", "bf16", "bfloat16, float32"),
        ("model.remat", "some", "none, dots, full"),
        ("data.source", "doly", "did you mean 'dolly'"),
        ("data.template", "alpaca", "chat, dolly"),
        ("data.overlength", "cut", "truncate, drop"),
        ("data.bad_lines", "ignore", "stop, skip"),
        ("runtime.progress", "rich", "auto, bar, lines"),
        ("steps", 0, "at least one step"),
        ("lora.rank", 0, "greater than 0"),
        ("lora.alpha", -1.0, "greater than 0"),
        ("data.seq_len", -1, "greater than 0"),
        ("data.batch_size", 0, "greater than 0"),
        ("optim.learning_rate", 0.0, "greater than 0"),
        ("lora.dropout", 1.0, "0 to 0.99"),
        ("lora.dropout", -0.1, "0 to 0.99"),
        ("optim.warmup", 1.5, "0 to 1"),
        ("optim.final", -0.5, "0 to 1"),
        ("data.microbatch_size", 3, "batch_size is 8: the micro-batch must divide"),
        ("data.microbatch_size", -2, "config.data.microbatch_size is -2"),
        # NumPy or optax would refuse these much later, or never.
        ("seed", -1, "seed"),
        ("optim.b1", 1.0, "b1"),
        ("optim.b2", -0.1, "b2"),
        ("optim.clip_norm", -1.0, "clip_norm"),
        ("optim.weight_decay", -0.1, "weight_decay"),
        ("data.max_rows", -1, "max_rows"),
    ],
)
def test_a_value_out_of_range_says_what_is_allowed(path, value, said):
    config = defaults()
    set_in(config, path, value)
    with pytest.raises(UserError, match=said) as raised:
        from_config_dict(config)
    assert f"config.{path}" in str(raised.value)


def test_microbatches_that_divide_are_allowed():
    for rows in (0, 1, 2, 4, 8):
        assert Config(data=DataConfig(microbatch_size=rows)).data.batch_size == 8


def test_a_resumed_run_may_change_how_it_runs_and_not_what():
    old = Config(run_dir="here")
    free = Config(
        run_dir="there",
        model=ModelConfig(remat="full", scan_unroll=2, attention_block=64),
        mesh=MeshConfig(data=2, fsdp=2),
        checkpoint=CheckpointConfig(every=5),
    )
    assert fixed_differences(old, free) == {}
    new = dataclasses.replace(free, seed=1, optim=OptimConfig(learning_rate=1e-3))
    assert fixed_differences(old, new) == {
        "seed": "0 -> 1",
        "optim.learning_rate": "0.0005 -> 0.001",
    }


def test_every_field_that_changes_the_result_is_fixed():
    """All that is not listed here; a new knob has to be thought about."""
    free = {
        "run_dir", "model.remat", "model.scan_unroll", "model.attention_block",
        "model.loss_chunk", "data.hub_timeout", "mesh.data", "mesh.fsdp",
        "mesh.tensor", "eval.prompts", "eval.max_new_tokens", "checkpoint.every",
        "eval.answers_every", "eval.answers_rows", "checkpoint.best_by",
        "checkpoint.keep_last", "checkpoint.keep_best", "runtime.compilation_cache",
        "runtime.peak_tflops", "runtime.progress", "runtime.distributed", "export",
        "eval.text_prompts", "eval.samples_every", "text.cache_dir", "mesh.replica",
        "mesh.context", "model.attention", "runtime.topology", "runtime.slices",
        "runtime.offload_optimizer", "runtime.profile_from", "runtime.profile_steps",
        "accept", "optim.rollbacks", "checkpoint.on_error", "runtime.grad_norms",
        "runtime.watchdog_s", "runtime.coordinator_address", "runtime.num_processes",
        "runtime.process_id", "replace_export", "checkpoint.loss_drop",
        "mesh.expert", "model.expert_kernel",
    }  # fmt: skip
    fixed = {path for path, field, _ in fields(Config()) if facts_of(field).fixed}
    fixed -= {"run_dir"}
    assert fixed == flat(Config()).keys() - free
    other = from_config_dict(changed())
    without_effect = idle(Config()).keys() & idle(other).keys()
    assert without_effect
    found = fixed_differences(Config(), other).keys()
    assert found == fixed - SINGLE - without_effect


def test_all_broken_limits_and_all_broken_rules_are_said_at_once():
    with pytest.raises(UserError) as raised:
        Config(steps=-7, seed=-1, lora=LoRAConfig(rank=0))
    said = str(raised.value).split("\n")
    assert [x.split()[0] for x in said[1:]] == [
        *("config.steps", "config.seed", "config.lora.rank")
    ]
    with pytest.raises(UserError) as raised:
        Config(steps=0, data=DataConfig(batch_size=8, microbatch_size=3))
    said = str(raised.value).split("\n")
    assert "at least one step" in said[1] and "divide the batch" in said[2]


def test_a_run_that_read_the_default_text_opens_as_it_was():
    values = dataclasses.asdict(Config()) | {"version": 2}
    values["data"]["kind"] = "text"
    del values["text"]["sources"]
    assert from_json(json.dumps(values)).text.sources == ("stdlib=stdlib",)


def test_the_config_for_eight_billion_names_its_rows():
    """An empty path falls back to the embedded sample where the hub is silent."""
    path = from_config_dict(finetune_8b.get_config()).data.path
    assert path == choices.ROW_SOURCES["dolly"]


KEPT = Path(__file__).parents[1] / "golden" / "kept" / "configs"


@pytest.mark.parametrize("file", sorted(KEPT.glob("*.json")), ids=lambda f: f.stem)
def test_a_config_of_an_earlier_version_opens(file):
    """The program of its date wrote each; one has an old name of a knob."""
    text = file.read_text()
    config = from_json(text)
    assert (config.lora.rank, config.seed, config.data.template) == (8, 3, "dolly")
    assert config.model.init_from.endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert config.optim.rollbacks == Config().optim.rollbacks
    assert from_json(to_json(config)) == config
    assert differences(text, config, Path("run")) == {}
    other = dataclasses.replace(config, seed=4)
    assert differences(text, other, Path("run")) == {"seed": "3 -> 4"}


def test_knobs_that_came_and_went_since_then(monkeypatch, caplog):
    change = KnobChange(
        renamed={"old.rank": "lora.rank"},
        removed={"optim.gone": 0.0, "never.there": 1},
        added={"optim.b2": 0.5, "seed": 7},
    )
    changes = (*saved_config.CHANGES, change)
    monkeypatch.setattr(saved_config, "CHANGES", changes)
    old = as_dict(version=len(changes) - 1, old={"rank": 3}, seed=1)
    del old["optim"]["b2"], old["lora"]["rank"]
    old["optim"]["gone"] = 0.0
    config = from_json(json.dumps(old))
    assert (config.lora.rank, config.optim.b2, config.seed) == (3, 0.5, 1)
    assert not caplog.text
    old["optim"]["gone"] = 0.25
    assert from_json(json.dumps(old)) == config
    assert "config.optim.gone=0.25 is gone" in caplog.text
    # The version of today has none of these.
    with pytest.raises(UserError, match=r"config\.old is not a knob"):
        from_json(json.dumps(old | {"version": len(changes)}))


@pytest.mark.parametrize("version", [len(saved_config.CHANGES) + 1, -1, "1", True, 1.5])
def test_a_config_of_a_later_version_is_refused(version):
    with pytest.raises(UserError, match=r"version .* this program reads versions 0 to"):
        from_json(json.dumps(as_dict(version=version)))


def test_relative_paths_lead_there_from_anywhere(tmp_path, monkeypatch):
    start, other = tmp_path / "a=1 [x]", tmp_path / "other"
    for place in (start / "base", start / "shards", other):
        place.mkdir(parents=True)
    config = Config(
        run_dir="run",
        model=ModelConfig(init_from="base"),
        data=DataConfig(path="shards/*.parquet"),
        text=TextConfig(
            sources=("a=base", "std=stdlib", "far=hub://o/n"), cache_dir="c"
        ),
    )
    monkeypatch.chdir(start)
    text = to_json(config)
    assert from_json(text) == config
    monkeypatch.chdir(other)
    opened = from_json(text, start / "run")
    assert opened.model.init_from == str(start / "base")
    assert opened.data.path == str(start / "shards/*.parquet")
    assert opened.text.sources == (f"a={start}/base", "std=stdlib", "far=hub://o/n")
    assert (opened.text.tokenizer, opened.text.cache_dir) == ("bpe:4096", "c")
    # An older version did not write the folder down: the run's own name tells it.
    old = json.dumps({k: v for k, v in json.loads(text).items() if k != "folder"})
    assert from_json(old, start / "run") == opened
    assert from_json(old, start / "moved") == config
    # The same place in other words, and a copy of everything elsewhere.
    run = start / "run"
    assert differences(text, opened, run) == {} == differences(text, config, run)
    (other / "base").mkdir()
    assert differences(text, config, run) == {}
    elsewhere = dataclasses.replace(opened, model=ModelConfig(init_from="absent"))
    changes = {"model.init_from": "'base' -> 'absent'"}
    assert differences(text, elsewhere, run) == changes
    (start / "base").rmdir()  # It has moved: the name is all that is left.
    assert from_json(text, run).model.init_from == "base"


SHIPPED = sorted(
    file.stem
    for file in (Path(__file__).parents[2] / "configs").glob("*.py")
    if file.stem != "__init__"
)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_a_lab_note_that_holds(name):
    module = importlib.import_module(f"configs.{name}")
    config = from_config_dict(module.get_config())
    assert config.run_dir == f"runs/{name}"
    assert f"--config=configs/{name}.py" in module.__doc__
    for part in ("Hardware:", "Duration:", "Expect:"):
        assert part in module.__doc__
    told = module.__doc__.partition("Duration:")[2]
    assert "TODO" not in told and ("measured" in told or "planned" in told)
