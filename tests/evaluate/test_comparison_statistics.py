"""Properties of intervals, tests and verdicts, on simulated results of models."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from research.evaluate.answered_row import AnsweredRow
from research.evaluate.statistics import measured, paired, resampling, verdicts
from research.evaluate.statistics.row_clusters import clusters_of


@pytest.fixture
def few_resamples(monkeypatch):
    """A tenth of the resamples: simulations repeat the whole test many times."""
    monkeypatch.setattr(resampling, "RESAMPLES", 500)


def random(seed=0):
    return np.random.default_rng(seed)


def means(values):
    return measured.mean([float(value) for value in values])


def test_the_interval_covers_the_true_difference_about_95_times_in_100(few_resamples):
    generator, found = random(), 0
    for _ in range(120):
        base = generator.normal(size=25)
        tuned = base + 0.3 + generator.normal(size=25) + generator.exponential(size=25)
        compared = paired.compare(means(base), means(tuned), range(25))
        found += compared.low <= 1.3 <= compared.high
    assert 0.90 <= found / 120 <= 0.99


SHAPES = {
    "normal": lambda generator, size: generator.normal(size=size),
    "skewed": lambda generator, size: generator.exponential(size=size) - 1,
    "answers right or wrong": lambda generator, size: generator.choice(
        [-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=size
    ),
}


@pytest.mark.soak
@pytest.mark.parametrize("rows", [20, 50, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_interval_covers_the_true_difference_of_any_shape(
    shape, rows, few_resamples
):
    """1000 simulations; the standard deviation of the share is 0.007."""
    generator, found = random(rows), 0
    for _ in range(1000):
        gaps = SHAPES[shape](generator, rows)
        compared = paired.compare(means(np.zeros(rows)), means(gaps), range(rows))
        found += compared.low <= 0 <= compared.high
    print(f"{shape}, {rows} rows: {found / 1000:.3f}")
    assert 0.88 <= found / 1000 <= 0.98


def test_p_values_are_uniform_where_the_models_are_equally_good(few_resamples):
    generator = random(1)
    p_values = []
    for _ in range(200):
        base, tuned = generator.normal(size=(2, 20))
        compared = paired.compare(means(base), means(tuned), range(20))
        p_values.append(compared.p_value)
    counts, _ = np.histogram(p_values, 4, (0, 1))
    assert counts.min() > 30 and counts.max() < 72  # 50 each; 4 sd is 24.
    assert np.mean(np.array(p_values) <= 0.05) < 0.12


def test_identical_models_differ_by_exactly_nothing():
    scores = means(random().normal(size=40))
    (judged,) = paired.compare_runs(
        {"m": scores}, {"copy": {"m": scores}}, range(40), {"m": True}
    )["copy"].values()
    compared = judged.comparison
    assert (compared.difference, compared.low, compared.high) == (0, 0, 0)
    assert (compared.p_value, compared.effect_size, compared.rows_needed) == (
        1,
        0,
        None,
    )
    assert judged.verdict == verdicts.NOTHING_SHOWN


@pytest.mark.parametrize("rows", [9, 30])
def test_exchanged_models_mirror_the_result(rows):
    base = means(random(2).normal(size=rows))
    tuned = means(random(3).exponential(size=rows))
    one = paired.compare(base, tuned, range(rows))
    two = paired.compare(tuned, base, range(rows))
    assert one.p_value == two.p_value
    assert one.rows_needed == two.rows_needed
    assert one.difference == -two.difference
    assert one.effect_size == pytest.approx(-two.effect_size)
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low))


def test_repeated_rows_do_not_narrow_the_interval():
    base, tuned = random(4).normal(size=(2, 30))
    once = paired.compare(means(base), means(tuned), range(30))
    thrice = [np.repeat(values, 3) for values in (base, tuned)]
    clustered = paired.compare(*map(means, thrice), np.repeat(np.arange(30), 3))
    assert clustered.clusters == 30 and clustered.rows == 90
    for field in ("low", "high", "p_value", "effect_size"):
        expected = getattr(once, field)
        assert getattr(clustered, field) == pytest.approx(expected), field
    as_if_new = paired.compare(*map(means, thrice), range(90))
    assert as_if_new.high - as_if_new.low < 0.7 * (clustered.high - clustered.low)
    # Rows of the same kind are needed: these come in threes.
    assert clustered.rows_needed == pytest.approx(3 * once.rows_needed, abs=3)


def test_every_row_of_a_cluster_counts():
    """Rows of one prompt may have other references, and so other scores."""
    compared = paired.compare(means([0, 0, 0, 0]), means([1, 2, 3, 10]), "aaab")
    assert (compared.difference, compared.rows, compared.clusters) == (4, 4, 2)


def test_the_p_value_of_few_rows_is_exact():
    """All 16 ways to flip the signs of four differences, by hand."""
    base, tuned = means([0, 0, 0, 0]), means([1, 2, 3, 2])
    assert paired.compare(base, tuned, range(4)).p_value == 2 / 16
    tuned = means([-1, 2, 3, 4])
    # Sums that are at least 8 in size: 10, 8 (flip 1), and the same below zero.
    assert paired.compare(base, tuned, range(4)).p_value == 4 / 16


def test_a_mean_has_the_textbook_effect_size_and_number_of_rows():
    gaps = random(5).normal(0.5, 1, 40)
    compared = paired.compare(means(np.zeros(40)), means(gaps), range(40))
    effect = gaps.mean() / gaps.std(ddof=1)
    assert compared.effect_size == pytest.approx(effect)
    assert compared.rows_needed == np.ceil(7.848879 / effect**2 + 1.920729)


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1e9, 1e200])
def test_the_unit_of_a_metric_does_not_matter(scale):
    base, tuned = random(8).normal(size=(2, 30))
    one = paired.compare(means(base), means(tuned), range(30))
    other = paired.compare(means(base * scale), means(tuned * scale), range(30))
    assert other.low == pytest.approx(one.low * scale, rel=1e-6)
    assert other.p_value == one.p_value
    assert other.effect_size == pytest.approx(one.effect_size)
    assert other.rows_needed == one.rows_needed


def test_so_many_rows_as_needed_show_the_difference_in_80_of_100(few_resamples):
    needed = paired.compare(
        means(np.zeros(4000)), means(random(6).normal(0.5, 1, 4000)), range(4000)
    ).rows_needed
    assert 31 <= needed <= 36  # 33.3 for an effect of exactly a half
    generator, shown = random(7), 0
    for _ in range(100):
        gaps = generator.normal(0.5, 1, needed)
        found = paired.compare(means(np.zeros(needed)), means(gaps), range(needed))
        shown += found.p_value <= 0.05
    assert 0.7 < shown / 100 < 0.9


def test_the_same_seed_gives_the_same_numbers_and_another_seed_does_not():
    base, tuned = map(means, random(8).normal(size=(2, 30)))
    one, two, other = (paired.compare(base, tuned, range(30), s) for s in (0, 0, 1))
    assert one == two
    assert other.low != one.low and other.low == pytest.approx(one.low, abs=0.05)


def test_blocks_of_resamples_are_only_for_memory(monkeypatch):
    base, tuned = map(means, random(9).normal(size=(2, 20)))
    whole = paired.compare(base, tuned, range(20))
    monkeypatch.setattr(resampling, "BLOCK", 20 * 777)
    assert paired.compare(base, tuned, range(20)) == whole


def test_rows_that_one_model_has_no_score_for_are_in_no_comparison():
    base = measured.mean([0.0, 0.0, None, 0.0, 1.0])
    tuned = measured.mean([1.0, None, 5.0, 1.0, 1.0])
    compared = paired.compare(base, tuned, "abcde")
    assert compared.rows == 3
    assert (compared.baseline, compared.candidate) == pytest.approx((1 / 3, 1))
    assert paired.compare(base, measured.mean([None] * 5), "abcde") is None


def test_a_ratio_is_resampled_with_its_denominator():
    """Loss per token: long rows count for more, and rows without tokens not at all."""
    base = measured.ratio([30.0, 2.0, 0.0, 4.0], [10, 1, 0, 1])
    assert base.scores == (3.0, 2.0, None, 4.0)
    assert base.value == 3.0
    found = paired.estimate(base, range(4))
    assert found.rows == 3 and found.low < 3.0 < found.high


@pytest.mark.parametrize(
    ("values", "better", "word"),
    [
        ([1.0] * 12, True, "better"),
        ([1.0] * 12, False, "worse"),
        ([-1.0] * 12, True, "worse"),
        ([-1.0] * 12, None, "lower"),
        ([1.0] * 12, None, "higher"),
        ([1.0, -1.0] * 6, True, "no difference shown"),
        ([1.0] * 5, True, "too few rows to tell"),
        ([1.0], True, "too few rows to tell"),
    ],
)
def test_verdicts(values, better, word):
    rows = len(values)
    base, tuned = {"m": means([0.0] * rows)}, {"m": means(values)}
    judged = paired.compare_runs(base, {"run": tuned}, range(rows), {"m": better})
    assert judged["run"]["m"].verdict == word
    json.dumps(asdict(judged["run"]["m"]), allow_nan=False)


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert paired.holm([0.6, 0.7]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_a_table_of_several_runs_is_one_family_of_tests():
    """A difference that one test would show is not shown among twenty."""
    gaps = random(13).normal(0.55, 1, 20)
    alone = paired.compare(means(np.zeros(20)), means(gaps), range(20))
    assert alone.p_value < 0.05 and alone.low > 0
    base = {"m": means(np.zeros(20))}
    noise = {f"n{i}": {"m": means(random(i).normal(size=20))} for i in range(19)}
    judged = paired.compare_runs(
        base, {"run": {"m": means(gaps)}, **noise}, range(20), {"m": True}
    )
    assert judged["run"]["m"].comparison == alone
    assert judged["run"]["m"].adjusted_p == pytest.approx(20 * alone.p_value)
    assert judged["run"]["m"].verdict == "no difference shown"


def test_a_clear_difference_is_shown_in_a_large_table(few_resamples):
    """The smallest p of 500 exchanges, times 50 tests, is above 0.05."""
    noise = random(3).normal(size=(30, 10))
    base = {f"m{i}": means(np.zeros(30)) for i in range(10)}
    run = {f"m{i}": means(2 + noise[:, i]) for i in range(10)}
    equal = {f"m{i}": means([1, -1] * 3 + [0] * 24) for i in range(10)}
    runs = {"run": run, **{f"equal {number}": equal for number in range(4)}}
    found = paired.compare_runs(base, runs, range(30), dict.fromkeys(base, True))
    assert {x.verdict for x in found["run"].values()} == {"better"}
    assert {x.verdict for x in found["equal 3"].values()} == {"no difference shown"}


@pytest.mark.parametrize("rows", [1, 8])
def test_one_cluster_does_not_tell_how_many_rows_are_needed(rows):
    compared = paired.compare(means([0.0] * rows), means([1.0] * rows), [0] * rows)
    assert (compared.clusters, compared.difference) == (1, 1)
    assert compared.rows_needed is None


def test_metrics_in_which_no_test_can_succeed_cost_the_others_nothing():
    """Among them those that are equal in every row, such as no empty answers."""
    gaps, zeros = random(11).normal(0.55, 1, 20), means(np.zeros(20))
    idle = {f"idle {number}": zeros for number in range(50)}
    nearly = means([1, 1, 1, *[0] * 17])
    base = {"m": zeros, "few": zeros, **idle}
    run = {"m": means(gaps), "few": nearly, **idle}
    judged = paired.compare_runs(base, {"run": run}, range(20), {})["run"]
    assert judged["m"].adjusted_p == judged["m"].comparison.p_value < 0.05
    few = judged["few"]
    assert (few.comparison.differing, few.adjusted_p) == (3, 1)
    assert few.verdict == judged["idle 1"].verdict == "no difference shown"


def test_a_p_that_survives_the_correction_has_enough_rows():
    """Holm multiplies less than the number of tests, from the second on."""
    rows = 7  # The smallest p is 2 / 128; four tests of it would be above 0.05.
    found = paired.compare(means([0.0] * rows), means([1.0] * rows), range(rows))
    assert verdicts.verdict(found, 0.047, 4, True) == verdicts.BETTER
    assert verdicts.verdict(found, 0.06, 4, True) == verdicts.TOO_FEW
    assert verdicts.verdict(found, 0.06, 1, True) == verdicts.NOTHING_SHOWN


def test_many_rows_get_fewer_resamples():
    """The draws are bounded; a thousand resamples stay."""
    assert resampling.resamples_of(500) == resampling.resamples_of(10_000) == 10_000
    assert resampling.resamples_of(50_000) == 2000
    assert resampling.resamples_of(10**7) == 1000


ROW = AnsweredRow(
    "id", "f:1", "", "f", "P", "q", "c", "r", "a", 1, 1, True
)  # fmt: skip


def test_rows_with_one_prompt_or_one_content_are_one_cluster():
    rows = [
        ROW,
        replace(ROW, prompt="other template", question=" Q "),  # same content
        replace(ROW, prompt="P2", question="q2"),
        replace(ROW, prompt="P2", question="q3", reference="r3"),  # same prompt
        replace(ROW, prompt="P4", reference="another answer"),
        replace(ROW, prompt="", question="", context="", reference=""),
        replace(ROW, prompt="", question="", context="", reference=""),
    ]
    assert clusters_of(rows) == [0, 0, 1, 1, 2, 3, 4]
    # A row that links two clusters joins them.
    link = replace(ROW, prompt="P4")
    assert clusters_of([*rows[:5], link]) == [0, 0, 1, 1, 0, 0]
