"""Evaluation divides once; bits per byte do not depend on how text was cut."""

import math

import numpy as np
import pytest

from research.data.metric_sums import Ratio
from research.train.metrics.evaluation import add_up

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
