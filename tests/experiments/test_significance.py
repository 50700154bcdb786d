"""How sure a difference is: against scipy's own tests, tables and simulation."""

import numpy as np
import pytest
from scipy import stats

from e3va_lite.experiments.significance import difference, holm, interval, noise


def test_a_difference_by_hand():
    d = difference([0.30, 0.40, 0.35], [0.20, 0.31, 0.24])  # .10 .09 .11: deviation .01, t(2) = 4.303
    assert d.mean == pytest.approx(0.10) and (d.low, d.high) == pytest.approx((0.0752, 0.1248), abs=1e-4)
    assert d.seeds == 3 and d.deviation == pytest.approx(0.01)


def test_p_values_are_those_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 0.03, 8), rng.normal(0.28, 0.03, 8)
    d = difference(a, b)
    for margin in (0.0, 0.02, -0.02):
        assert d.p_more(margin) == pytest.approx(stats.ttest_rel(a, b + margin, alternative="greater").pvalue)
        assert d.p_less(margin) == pytest.approx(stats.ttest_rel(a, b + margin, alternative="less").pvalue)
    assert d.p_more(0.01) + d.p_less(0.01) == pytest.approx(1)


def test_level_is_two_one_sided_tests():
    rng = np.random.default_rng(10)
    a, b = rng.normal(0.3, 0.01, 8), rng.normal(0.305, 0.01, 8)
    above = stats.ttest_rel(a, b - 0.02, alternative="greater").pvalue
    below = stats.ttest_rel(a, b + 0.02, alternative="less").pvalue
    assert difference(a, b).p_level(0.02) == pytest.approx(max(above, below))
    assert difference(a, b + 0.1).p_level(0.02) > 0.99 < difference(a + 0.1, b).p_level(0.02)


def test_methods_as_far_apart_as_what_counts_as_near_are_rarely_level():
    rng = np.random.default_rng(11)
    apart = [difference(rng.normal(3, 1, 8), np.zeros(8)).p_level(3) < 0.025 for _ in range(4000)]
    alike = [difference(rng.normal(0, 1, 8), np.zeros(8)).p_level(3) < 0.025 for _ in range(4000)]
    assert np.mean(apart) < 0.035 and np.mean(alike) > 0.95


def test_scores_without_spread():
    equal, above = difference([0.2, 0.2], [0.2, 0.2]), difference([0.3, 0.3], [0.2, 0.2])
    assert equal.p_more() == equal.p_less() == 1 and equal.p_more(-0.02) == equal.p_level(0.02) == 0
    assert above.p_more() == 0 and above.p_less() == 1


def test_the_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(1)
    once = difference(rng.normal(0, 1, 8), np.zeros(8))
    true = once.detectable / once.deviation  # in deviations
    found = [difference(rng.normal(true, 1, 8), np.zeros(8)).p_more() < 0.025 for _ in range(4000)]
    assert 0.74 < np.mean(found) < 0.86


def test_the_interval_holds_the_mean_in_95_of_100():
    rng = np.random.default_rng(2)
    hits = [abs(mean - 0.5) <= half for mean, half in (interval(rng.normal(0.5, 0.1, 5)) for _ in range(4000))]
    assert 0.94 < np.mean(hits) < 0.96


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_holm_lets_one_false_claim_in_twenty_through():
    """Twenty claims, none of them true: how often at least one of them is believed."""
    rng = np.random.default_rng(3)
    assert np.mean([min(holm(rng.uniform(size=20).tolist())) < 0.05 for _ in range(4000)]) < 0.06


def test_as_many_seeds_as_are_needed_find_the_difference_four_times_in_five():
    rng = np.random.default_rng(4)
    once = difference((rng.normal(0, 1, 6) + 1).tolist(), [0.0] * 6)
    true = once.mean / once.deviation  # in deviations
    n = once.seeds_needed()
    found = [difference(rng.normal(true, 1, n), np.zeros(n)).p_more() < 0.025 for _ in range(4000)]
    assert 0.78 < np.mean(found) < 0.9  # n is whole
    assert once.seeds_needed(claims=30) > n and once.seeds_needed(margin=once.mean) is None


def test_as_many_seeds_as_are_needed_find_that_methods_are_level_four_times_in_five():
    once = difference([0.5, -0.5, 0.6, -0.4], [0.0] * 4)
    true, near = once.mean / once.deviation, 1.0  # in deviations
    n = once.seeds_needed(near=near * once.deviation)
    assert once.seeds_needed() is None  # they can hardly be told apart
    rng = np.random.default_rng(12)
    found = [difference(rng.normal(true, 1, n), np.zeros(n)).p_level(near) < 0.025 for _ in range(4000)]
    assert 0.74 < np.mean(found) < 0.9


def by_seed(scores):
    return dict(zip(map(str, range(len(scores))), map(float, scores), strict=True))


def test_the_noise_of_two_methods_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.3, 0.03, 6), rng.normal(0.28, 0.03, 6)
    shared, alone = difference(a, b, noise([by_seed(a), by_seed(b)])), difference(a, b)
    assert (shared.deviation, shared.freedom, shared.methods) == pytest.approx((alone.deviation, 5, 2))
    assert (shared.low, shared.high, shared.p_more(0.01)) == pytest.approx((alone.low, alone.high, alone.p_more(0.01)))


def test_the_noise_of_a_block_design_by_hand():
    """Without a missing score it is what remains after means of rows and columns."""
    scores = np.random.default_rng(6).normal(0, 1, (4, 5))
    left = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    found = noise(by_seed(row) for row in scores)
    assert found.freedom == 12 and found.deviation == pytest.approx((np.square(left).sum() / 12) ** 0.5)
    moved = scores + np.array([[5.0], [0], [1], [9]]) + np.arange(5)  # methods and seeds are no noise
    assert noise(by_seed(row) for row in moved).deviation == pytest.approx(found.deviation)


def test_the_interval_of_a_mean_is_that_of_a_difference_over_the_root_of_two():
    scores = [by_seed(row) for row in np.random.default_rng(13).normal(0, 1, (4, 5))]
    d = difference(list(scores[0].values()), list(scores[1].values()), noise(scores))
    assert noise(scores).half(5) * 2**0.5 == pytest.approx((d.high - d.low) / 2)


def test_missing_seeds_take_degrees_of_freedom_away():
    scores = np.random.default_rng(7).normal(0, 1, (4, 5))
    methods = [by_seed(row) for row in scores]
    del methods[0]["4"], methods[2]["3"]
    assert noise(methods).freedom == 10


def test_shared_noise_believes_too_much_as_rarely_as_it_says():
    """Seven methods, three seeds, only one of them better: what is believed of the others, and of it."""
    rng = np.random.default_rng(8)
    wrong, alone, shared = [], [], []
    for _ in range(2000):
        scores = rng.normal(0, 1, (7, 3)) + rng.normal(0, 1, 3)
        scores[1] += 3
        every = noise(by_seed(row) for row in scores)
        wrong.append(difference(scores[2], scores[3], every).p_more() < 0.025)
        shared.append(difference(scores[1], scores[0], every).p_more() < 0.025)
        alone.append(difference(scores[1], scores[0]).p_more() < 0.025)
    assert np.mean(wrong) < 0.035
    assert np.mean(shared) > 0.9 > 0.7 > np.mean(alone)  # what it is for


def test_unequal_noise_is_noticed():
    rng = np.random.default_rng(9)
    alike = [by_seed(rng.normal(0, 1, 8)) for _ in range(8)]
    assert noise(alike).equal > 0.05
    assert noise([*alike, by_seed(rng.normal(0, 20, 8))]).equal < 0.01
    assert noise([by_seed([0.1, 0.2]), by_seed([0.3, 0.2])]).equal is None  # two scores say nothing
