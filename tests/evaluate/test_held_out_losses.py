"""Evaluation divides once; bits per byte do not depend on how text was cut."""

import math

import numpy as np
import pytest

from research.data.metric_sums import Ratio
from research.evaluate.held_out_losses import add_up
from research.evaluate.loss_values import as_json
from research.report.result_tables import compare_losses, tabulate_losses

GROUPS = ["books", "code", "unseen"]


def sums(loss, weight):
    return {"loss": Ratio(np.array(loss), np.array(weight))}


BATCHES = [sums([2.0, 9.0, 0.0], [1, 3, 0]), sums([4.0, 0.0, 0.0], [5, 0, 0])]


def test_loss_is_of_all_tokens_not_of_batches():
    found = add_up(BATCHES, GROUPS, {})
    assert found.loss == pytest.approx(15 / 9)
    assert found.by_group == pytest.approx({"books": 1.0, "code": 3.0})
    assert found.tokens == {"books": 6, "code": 3}
    assert found.bits_per_byte is None and found.bits_by_group == {}


def test_bits_per_byte_are_bits_over_the_bytes_of_each_source():
    found = add_up(BATCHES, GROUPS, {"books": 12, "code": 6})
    bits = {"books": 6 / math.log(2) / 12, "code": 9 / math.log(2) / 6}
    assert found.bits_by_group == pytest.approx(bits)
    assert found.bits_per_byte == pytest.approx(15 / math.log(2) / 18)
    # A source without bytes, such as one of which the tokenizer loses text.
    found = add_up(BATCHES, GROUPS, {"code": 6})
    assert found.bits_per_byte == found.bits_by_group["code"] == bits["code"]
    assert found.loss == pytest.approx(15 / 9)


def test_rows_without_a_category_are_one_row_of_every_table():
    """Their name in files is no category that a user gave them."""
    found = add_up([sums([12.0, 0.0], [6, 0])], [""], {"": 12})
    assert found.by_group.keys() == found.tokens.keys() == found.bits_by_group.keys()
    line = {"step": 0, **found.line()}
    fields = [x for x in line if "/" in x]
    assert fields == ["loss/(none)", "tokens/(none)", "bits_per_byte/(none)"]
    older = {x.replace("(none)", ""): value for x, value in line.items()}
    for first in (line, older):
        _, *rows = tabulate_losses([first, line | {"step": 3}])
        assert [row[:2] for row in rows] == [["all", "6"]]
    written = as_json(found)["by_group"]
    assert [x["tokens"] for x in written.values()] == [6]

    groups = ["", "(none)", "a"]
    found = add_up([sums([2.0, 9.0, 8.0], [1, 3, 2])], groups, {})
    assert [*as_json(found)["by_group"]] == groups
    names = ["(none)", "(none) (category)", "a", "all"]
    _, *rows = compare_losses({"base": found.line(), "tuned": found.line()})
    assert [row[:2] for row in rows] == [
        list(x) for x in zip(names, "1326", strict=True)
    ]
