"""Intervals and verdicts say what they claim, on numbers whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from launch.report import seed_statistics


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 0.5, (3000, 3))
    found = [seed_statistics.interval(list(row)) for row in samples]
    share = np.mean([x.low <= 3.0 <= x.high for x in found])
    assert share == pytest.approx(0.95, abs=0.012)


def test_one_value_has_no_interval():
    assert seed_statistics.interval([2.0]).half == math.inf


def test_a_comparison_is_the_paired_t_test_over_shared_seeds():
    mine = {0: 2.5, 1: 2.9, 2: 2.1, 7: 9.0}
    other = {0: 2.6, 1: 3.1, 2: 2.25, 5: 0.0}
    found = seed_statistics.compare(mine, other)
    seeds = (0, 1, 2)
    expected = stats.ttest_rel([mine[s] for s in seeds], [other[s] for s in seeds])
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx(interval)
    assert found.difference.count == 3
    assert seed_statistics.compare({0: 1.0}, {1: 1.0}) is None


def test_holm_keeps_order_and_corrects_for_the_number():
    # By hand: 4 * 0.01, 3 * 0.02, 2 * 0.03 and never below the one before.
    assert seed_statistics.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx(
        [0.06, 0.04, 0.5, 0.06]
    )
    assert (
        seed_statistics.holm([0.9, 0.8]) == [1.0, 1.0]
        and seed_statistics.holm([]) == []
    )


def test_runs_that_differ_by_chance_alone_are_rarely_called_different():
    """At most 5 % of sweeps of five equal points may have any verdict."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        baseline = dict(enumerate(rng.normal(size=3)))
        found = [
            seed_statistics.compare(dict(enumerate(rng.normal(size=3))), baseline)
            for _ in range(4)
        ]
        adjusted = seed_statistics.holm([x.p for x in found])
        said = [
            seed_statistics.verdict(x, p, 4)
            for x, p in zip(found, adjusted, strict=True)
        ]
        wrong += any(not x.startswith("not distinguishable at 3 seeds") for x in said)
    assert wrong <= 18


@pytest.mark.parametrize(
    "mine, said",
    [
        ((2.0, 2.11, 1.9), "better than the baseline by 0.9967"),
        ((4.0, 4.11, 3.9), "worse than the baseline by 1.0033"),
        ((2.0, 4.0, 3.1), "not distinguishable at 3 seeds"),
    ],
)
def test_a_verdict_says_which_way(mine, said):
    found = seed_statistics.compare(
        dict(enumerate(mine)), dict(enumerate((3.0, 3.1, 2.9)))
    )
    assert seed_statistics.verdict(found, found.p, 1) == said


def test_equal_differences_at_every_seed_are_no_division_by_zero():
    same = seed_statistics.compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same.p == 1.0
    assert "not distinguishable" in seed_statistics.verdict(same, same.p, 1)


def test_one_seed_gives_no_verdict():
    found = seed_statistics.compare({0: 1.0}, {0: 9.0})
    assert "one seed cannot show chance" in seed_statistics.verdict(found, found.p, 1)
