"""The shares of a search's variance, and the lead of one hyperparameter."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from softprompt.analysis.comparisons import at_least, verdict
from softprompt.analysis.importance import lead, variance_shares
from softprompt.errors import UserError

TRIALS, FACTORS = 33, tuple("abcdefgh")


def search(effects, seed):
    """Levels and scores of a search in which some factors have an effect, in noise of 1."""
    random = np.random.default_rng(seed)
    levels = {name: random.permutation(np.arange(TRIALS) % 3).tolist() for name in FACTORS}
    scores = random.normal(size=TRIALS)
    for name, effect in effects.items():
        scores += effect * (np.array(levels[name]) - 1)
    return levels, scores


def test_a_share_is_that_of_the_analysis_of_variance():
    """Breaks when levels are weighted alike whatever their size, or equal scores have shares."""
    random = np.random.default_rng(0)
    levels = {"a": list("xxxxxyyz"), "b": [0, 1] * 4}
    scores = random.normal(5, 1, size=8)
    for name, share in variance_shares(levels, scores).items():
        groups = [scores[np.array(levels[name]) == one] for one in dict.fromkeys(levels[name])]
        f = stats.f_oneway(*groups).statistic
        between = f * (len(groups) - 1)
        assert share.value == pytest.approx(between / (between + 8 - len(groups)))
        assert share.low < share.value < share.high
    with pytest.raises(UserError, match=r"all 8 trials .* one score, 5\.0"):
        variance_shares(levels, [5.0] * 8)


@pytest.mark.parametrize(
    "effects, least, most",
    [
        ({}, {"undecided": 1.0}, {}),
        ({"a": 0.7, "b": 0.7}, {"undecided": 0.99}, {}),
        ({"a": 3.0}, {"holds": 0.9}, {"refuted": 0}),
        ({"b": 3.0}, {"refuted": 0.9}, {"holds": 0}),
    ],
)
def test_the_lead_decides_as_often_as_it_should(effects, least, most):
    """Breaks when the interval is that of one comparison, or the largest of all is the second."""
    found = Counter()
    for seed in range(150):
        shares = variance_shares(*search(effects, seed), draws=600, seed=seed)
        found[verdict(lead(shares, "a"), at_least(0))] += 1 / 150
    assert all(found[word] >= share - 1e-9 for word, share in least.items()), found
    assert all(found[word] <= share + 1e-9 for word, share in most.items()), found
