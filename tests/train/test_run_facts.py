"""The report says of the knobs what the user wrote, and only where it is unusual."""

from research.config.run_config import Config, LoRAConfig
from research.train.run_facts import changed_knobs, count_dropped


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
