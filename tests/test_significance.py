"""Paired tests: known answers, and that seeds do not count as further users."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recbole_gacllm.compare.significance import compare, holm, marks, mean_interval


def scores(values, *seeds):
    of_users = pd.Series(values, index=[f"u{n}" for n in range(len(values))])
    return dict.fromkeys(seeds or [2020], of_users)


def paired(baseline, ours):
    return compare({"A": baseline, "B": ours}, "A")["B"]


@pytest.fixture
def noisy():
    rng = np.random.default_rng(3)
    base = rng.random(40)
    return base, base + rng.normal(0.05, 0.1, 40)


def test_the_p_values_are_those_of_scipys_paired_tests(noisy):
    base, better = noisy
    test = paired(scores(base), scores(better))
    assert test.t_p == pytest.approx(stats.ttest_rel(better, base).pvalue, rel=1e-12)
    assert test.wilcoxon_p == pytest.approx(stats.wilcoxon(better, base).pvalue, rel=1e-12)
    assert test.difference == pytest.approx((better - base).mean())
    interval = stats.ttest_rel(better, base).confidence_interval(0.95)
    assert test.interval == pytest.approx((interval.low, interval.high))


def test_users_are_paired_by_token_not_by_row(noisy):
    base, better = noisy
    straight = paired(scores(base), scores(better))
    turned = {2020: scores(better)[2020].iloc[::-1]}
    assert paired(scores(base), turned).t_p == pytest.approx(straight.t_p)


def test_the_same_result_in_five_seeds_is_no_stronger_evidence_than_in_one(noisy):
    base, better = noisy
    once = paired(scores(base), scores(better))
    again = paired(scores(base, *range(5)), scores(better, *range(5)))
    assert again.n_users == 40
    assert again.t_p == pytest.approx(once.t_p)
    assert again.by_seed[3][1] == pytest.approx(once.t_p)


def test_users_of_any_seed_count_with_their_mean():
    ours = {1: pd.Series({"a": 1.0, "b": 0.5}), 2: pd.Series({"a": 0.0, "c": 0.25})}
    zero = {seed: values * 0 for seed, values in ours.items()}
    test = paired(zero, ours)
    assert test.n_users == 3
    assert test.difference == pytest.approx((0.5 + 0.5 + 0.25) / 3)


def test_only_seeds_that_both_models_have_are_compared(noisy):
    base, better = noisy
    both = scores(base, 2020, 2021)
    assert paired(both, scores(better)).seeds == (2020,)
    assert compare({"A": both, "B": scores(better, 7)}, "A") == {}


def test_models_tested_on_different_users_are_refused():
    with pytest.raises(ValueError, match=r"seed 2020: B and A were tested on different users"):
        paired(scores([1.0, 0.0]), scores([1.0, 0.0, 0.0]))


def test_equal_models_differ_with_no_significance():
    test = paired(scores([0.5, 0.1, 0.0]), scores([0.5, 0.1, 0.0]))
    assert (test.difference, test.t_p, test.wilcoxon_p) == (0.0, 1.0, 1.0)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1, then never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_applied_across_the_compared_models(noisy):
    base, better = noisy
    tests = compare({"A": scores(base), "B": scores(better), "C": scores(base * 0.99)}, "A")
    assert [t.t_p_holm for t in tests.values()] == holm([t.t_p for t in tests.values()])
    assert tests["B"].t_p_holm > tests["B"].t_p or tests["C"].t_p_holm > tests["C"].t_p


def test_best_and_second_share_ties_and_know_the_direction():
    assert marks({"A": 0.3, "B": 0.2, "C": 0.3, "D": 0.1}) == {
        "A": "best",
        "B": "second",
        "C": "best",
        "D": "",
    }
    assert marks({"A": 0.3, "B": 0.2}, smaller_is_better=True) == {"A": "second", "B": "best"}


def test_the_interval_of_a_mean_is_the_t_interval_over_users(noisy):
    base, _ = noisy
    expected = stats.t.interval(0.95, 39, base.mean(), stats.sem(base))
    assert mean_interval(scores(base)) == pytest.approx(expected)
