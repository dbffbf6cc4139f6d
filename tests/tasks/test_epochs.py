"""Epochs become a number of steps, once the packed rows are counted."""

import dataclasses
import re

import pytest

from research.config.data_knobs import DataConfig, TextConfig
from research.config.knobs import changed
from research.config.run_config import (
    BY_EPOCHS,
    Config,
    defaults,
    fixed_differences,
    from_config_dict,
    with_length,
)
from research.config.saved_config import from_json, to_json
from research.core.errors import UserError
from research.tasks.epochs import (
    count_epochs,
    passed,
    require_batch,
    resolved,
    smaller_batch,
)


def config_of(epochs, batch=8, **data):
    return Config(
        steps=BY_EPOCHS, epochs=epochs, data=DataConfig(batch_size=batch, **data)
    )


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [
        (3.0, 100, 8, 38),  # 37.5 batches: the last one begins a fourth epoch.
        (1.0, 96, 8, 12),
        (0.5, 96, 8, 6),
        (0.1, 30, 3, 1),  # In binary 0.1 * 30 is more than 3.
        (0.7, 10, 7, 1),
        (1e-6, 5, 8, 1),
        (2.0, 3, 8, 1),
    ],
)
def test_each_row_is_trained_as_often_as_there_are_epochs(epochs, rows, batch, steps):
    config = resolved(config_of(epochs, batch), rows)
    assert (config.steps, config.epochs) == (steps, 0.0)
    assert resolved(config, 10**6) == config  # A run that gives steps keeps them.
    assert passed(steps, config, rows) >= epochs
    assert passed(steps - 1, config, rows) < epochs


def test_rows_that_nobody_counted_have_no_epochs():
    with pytest.raises(UserError, match=r"--config\.steps=NUMBER"):
        resolved(config_of(2.0), 0)
    assert passed(7, Config(), 0) is None
    streamed = TextConfig(sources=("a=b",), cache=False)
    with pytest.raises(UserError, match=r"--config\.text\.cache=True"):
        Config(steps=-1, epochs=1.0, data=DataConfig(kind="text"), text=streamed)


def test_only_one_of_steps_and_epochs_can_be_asked_for():
    given = defaults()
    assert from_config_dict(given).steps == 100
    given.epochs = 3.0
    config = from_config_dict(given)
    assert (config.steps, config.epochs) == (BY_EPOCHS, 3.0)
    assert from_json(to_json(config)) == config
    longer = dataclasses.replace(config, epochs=4.0)
    assert fixed_differences(config, longer) == {"epochs": "3.0 -> 4.0"}
    for steps in (100, 60):  # Also the number that is the default.
        given.steps = steps
        with pytest.raises(UserError, match=f"steps is {steps}.*--config.steps=-1"):
            from_config_dict(given)
    for steps in (0, -2):
        with pytest.raises(UserError, match="steps"):
            Config(steps=steps)
    for epochs in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="epochs"):
            changed(Config(), {"epochs": epochs, "steps": BY_EPOCHS}, "test")


@pytest.mark.parametrize("rows, batch, fits", [(3, 64, 2), (1, 2, 1), (9, 10, 8)])
def test_a_batch_larger_than_all_rows_is_said_with_one_that_fits(rows, batch, fits):
    config = dataclasses.replace(config_of(1.0, batch), steps=1, epochs=0.0)
    found = count_epochs(config, {"rows": rows}, {"rows": 1.0})
    assert found.warns and f"--config.data.batch_size={fits}, or" in found.text
    assert "one epoch is 1 step (" in found.text and "this run is 1 step" in found.text
    assert ("(1 row, " in found.text) == (rows == 1)
    passes = dataclasses.replace(config.data, batch_size=12, microbatch_size=6)
    assert smaller_batch(passes, 9) == (
        "set --config.data.batch_size=8 --config.data.microbatch_size=8"
    )


@pytest.mark.parametrize(
    "rows, batch, micro, unit, fits",
    [
        (3, 64, 0, 1, (2,)),
        (9, 12, 6, 1, (8, 8)),
        (9, 12, 4, 2, (8,)),
        (13, 30, 0, 3, (12,)),
        (7, 8, 0, 8, ()),
        (8, 8, 0, 8, None),
        (0, 8, 0, 1, None),
    ],
)
def test_fewer_rows_than_a_batch_are_refused_with_values_that_work(
    rows, batch, micro, unit, fits
):
    data = DataConfig(batch_size=batch, microbatch_size=micro)
    if fits is None:
        return require_batch(data, rows, unit)
    with pytest.raises(UserError, match=f"batch_size is {batch}, and ") as raised:
        require_batch(data, rows, unit)
    values = [int(x) for x in re.findall(r"size=(\d+)", str(raised.value))]
    assert values == [*fits] and str(raised.value).count("--config.data.") == len(fits)
    if fits:
        size, passes = fits[0], fits[-1] if len(fits) > 1 else micro or fits[0]
        require_batch(dataclasses.replace(data, batch_size=size), rows, unit)
        assert size % passes == 0 == passes % unit and size <= rows
    else:
        assert "fewer than this mesh needs, 8: give more data" in str(raised.value)


def test_a_list_of_runs_may_vary_either():
    by_steps, by_epochs = Config(steps=60), config_of(2.0)
    assert changed(by_steps, with_length(by_steps, {"epochs": 1.0}), "").epochs == 1
    assert changed(by_epochs, with_length(by_epochs, {"steps": 9}), "").steps == 9
    assert with_length(by_steps, {"steps": 9, "seed": 1}) == {"steps": 9, "seed": 1}
    both = {"steps": 9, "epochs": 1.0}
    with pytest.raises(UserError, match="only one of them"):
        changed(by_steps, with_length(by_steps, both), "test")


def test_the_doctor_says_how_long_an_epoch_is_and_warns_of_many():
    config = resolved(config_of(3.0), 100)
    found = count_epochs(config, {"rows": 100}, {"rows": 1.0})
    assert (
        "one epoch is 13 steps (100 rows, 8 a step), and this run is 38" in found.text
    )
    assert found.numbers == {
        "epochs": 3.04, "rows": 100, "steps": 38, "epoch_steps": 13,
    }  # fmt: skip
    assert found.ok and not found.warns
    often = dataclasses.replace(config, steps=126)
    assert count_epochs(often, {"rows": 100}, {"rows": 1.0}).warns
    streamed = count_epochs(often, {}, {})
    assert streamed.ok and "not been counted" in streamed.text
