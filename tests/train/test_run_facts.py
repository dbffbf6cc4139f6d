"""The report says of the knobs what the user wrote, and only where it is unusual."""

from types import SimpleNamespace

from research.config.run_config import Config, DataConfig, LoRAConfig
from research.tasks.findings import DROPPED, Finding
from research.train.run_facts import changed_knobs, count_dropped, describe


def test_facts_say_model_rows_recipe_machine_and_code():
    start = {
        "devices": "2 x TPU v4",
        "provenance": {
            "packages": {"jax": "0.12"},
            "python": "3.13",
            "code": "1 commit",
            "command": ["-m", "research.train", "--config=a b.py"],
        },
    }
    config = Config(steps=3, data=DataConfig(batch_size=1, seq_len=64))
    run = SimpleNamespace(
        config=config,
        ended_early="",
        base=SimpleNamespace(name="a model", fingerprint="ab" * 32),
        answers=SimpleNamespace(not_asked=["a.jsonl:7: too long"]),
        task=SimpleNamespace(origin="a.jsonl", sha256="cd" * 32, rows=2),
        definition=SimpleNamespace(
            trainable=SimpleNamespace(kind=SimpleNamespace(name="lora")),
            mesh=SimpleNamespace(shape={"data": 2}),
        ),
        history=SimpleNamespace(starts=[start, start], accepted_by_step={}),
        examination=SimpleNamespace(
            findings=[
                Finding("parameters", "", numbers={"trained": 1000, "frozen": 3000}),
                Finding("lora targets", "", numbers={"matrices": 4}),
                Finding(DROPPED, "", numbers={"too long": 2}),
            ]
        ),
    )
    facts = describe(run, 3)
    assert "ended early" not in facts
    run.ended_early, run.config = "the loss fell", Config(steps=9, data=config.data)
    assert describe(run, 3)["ended early"] == "3 of 9 steps: the loss fell"
    assert describe(run, 3)["steps"] == 3 and describe(run, 3)["epochs"] == 1.5
    assert facts["trained"] == "1,000 of 4,000 parameters (25.00%)"
    assert facts["batch"] == "1 row of 64 tokens; passes: 1"
    assert facts["adapters"].endswith("on 4 matrices: attention, mlp")
    assert facts["not asked"] == "1 held-out row (a.jsonl:7: too long)"
    assert (facts["epochs"], facts["starts"], facts["mesh"]) == (1.5, 2, "data=2")
    assert facts["versions"] == "jax 0.12, Python 3.13"
    assert facts["command"] == "python -m research.train '--config=a b.py'"


def test_only_knobs_that_differ_are_listed_with_their_defaults():
    assert changed_knobs(Config(run_dir="runs/a"), Config()) == [
        ["knob", "value", "default"]
    ]
    config = Config(seed=3, lora=LoRAConfig(targets=("mlp",)))
    assert changed_knobs(config, config)[1:] == [
        ["config.seed", "3", "0"],
        ["config.lora.targets", "('mlp',)", "('attention', 'mlp')"],
    ]


def test_dropped_rows_are_counted_by_reason():
    counted = count_dropped({"truncated": 0, "too long": 1200, "empty response": 1})
    assert counted == "1 empty response, 1,200 too long; see left_out.txt"
    assert count_dropped({"truncated": 0}) == "none"


def test_epochs_are_listed_as_they_were_written_and_not_their_steps():
    (row,) = changed_knobs(Config(steps=37), Config(epochs=2.5))[1:]
    assert row == ["config.epochs", "2.5", "0.0"]
