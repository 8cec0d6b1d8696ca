"""Paired differences and verdicts, on data whose truth is known."""

import math

import numpy as np
import pytest

from softprompt.analysis.comparisons import (
    Estimate,
    at_least,
    at_most,
    contrast,
    mean_score,
    paired_difference,
    slope,
    verdict,
)
from softprompt.errors import UserError


def simulated(random, *, gap, seeds, examples, tasks, spread):
    """Right answers of two methods whose mean accuracies differ by `gap` in expectation.

    An example's difficulty is common to both, and so is drawn once; each seed of each method is
    better or worse than its mean by a normal amount.
    """
    ours, theirs = {}, {}
    for task in range(tasks):
        difficulty_E = random.normal(0, 0.15, examples)
        for side, mean in ((ours, 0.6 + gap), (theirs, 0.6)):
            seeds_S = random.normal(0, spread, seeds)
            share_SE = np.clip(mean + difficulty_E + seeds_S[:, None], 0, 1)
            side[f"task{task}"] = (random.random((seeds, examples)) < share_SE).astype(float)
    return ours, theirs


@pytest.mark.parametrize(
    ("seeds", "examples", "tasks", "spread"),
    [
        (1, 300, 1, 0.0),
        (3, 300, 1, 0.05),
        (3, 200, 3, 0.03),
        (5, 100, 2, 0.0),
        (3, 1000, 1, 0.03),
        (5, 1000, 1, 0.02),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(seeds, examples, tasks, spread):
    """Breaks when seeds are resampled as examples are, or what examples explain is subtracted from
    what seeds do (too narrow); when pairs are torn apart (too wide); or when examples count once
    for each seed."""
    random, trials, covered = np.random.default_rng(0), 2000, 0
    for trial in range(trials):
        pair = simulated(
            random, gap=0.05, seeds=seeds, examples=examples, tasks=tasks, spread=spread
        )
        found = paired_difference(*pair, draws=400, seed=trial)
        covered += found.low <= 0.05 <= found.high
    # 93 to 97 %, and what 2,000 trials can be off by.
    print(f"{covered / trials:.3f}")
    assert 0.93 - 0.01 < covered / trials < 0.97 + 0.01


def test_a_contrast_of_tasks_with_common_seeds_covers_the_truth():
    """Breaks when the tasks' seeds are taken as independent (91 %)."""
    weights = {"a": -1.0, "b": 0.5, "c": 0.5}
    random, trials, covered = np.random.default_rng(0), 2000, 0
    for trial in range(trials):
        seeds_S = random.normal(0, 0.2, 3)  # common to b and c
        scores = {
            name: (share + effect * seeds_S[:, None]) + random.normal(0, 0.4, (3, 200))
            for name, share, effect in (("a", 0.1, 0.0), ("b", 0.2, 1.0), ("c", 0.4, 1.0))
        }
        found = contrast(weights, scores, draws=400, seed=trial)
        covered += found.low <= 0.2 <= found.high
    print(f"{covered / trials:.3f}")
    assert 0.93 - 0.01 < covered / trials < 0.97 + 0.01


def test_a_contrast_of_one_task_is_its_mean():
    """Breaks when weights of variances are not squared."""
    random = np.random.default_rng(0)
    scores = {"t": random.normal(0.5, 0.2, (3, 100)) + random.normal(0, 0.1, (3, 1))}
    one, other = contrast({"t": 1.0}, scores), mean_score(scores)
    assert one.value == pytest.approx(other.value)
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.02)
    few = {"t": scores["t"][:, :10]}
    once, twice = (contrast({"t": weight}, few) for weight in (1.0, 2.0))
    assert (twice.low, twice.high) == pytest.approx((2 * once.low, 2 * once.high))
    with pytest.raises(UserError, match="same seeds of each task"):
        contrast({"t": 1.0, "u": 1.0}, scores | {"u": scores["t"][:2]})


def test_the_interval_is_at_least_that_of_the_examples():
    """Breaks when equal seeds make it narrower."""
    scores_E = (np.arange(200) % 4 > 0).astype(float)
    one, three = (mean_score({"t": np.tile(scores_E, (seeds, 1))}) for seeds in (1, 3))
    assert one.value == three.value == 0.75
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)
    assert one.high - one.low == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / 200), rel=0.1)


def test_pairs_must_fit():
    """Breaks when other tasks or examples are compared without a word."""
    some = {"a": np.ones((2, 5))}
    for other, message in (
        ({"b": np.ones((2, 5))}, "same tasks"),
        ({"a": np.ones((2, 6))}, r"'a'.*\(2, 5\) and \(2, 6\)"),
    ):
        with pytest.raises(UserError, match=message):
            paired_difference(some, other)


def interval(low, high):
    return Estimate((low + high) / 2, low, high, np.array([low, high]))


@pytest.mark.parametrize(
    ("found", "prediction", "wanted"),
    [
        (None, at_least(15), "not run"),
        (interval(16, 20), at_least(15), "holds"),
        (interval(14, 20), at_least(15), "undecided"),
        (interval(5, 14), at_least(15), "refuted"),
        (interval(5, 14), at_least(15, refuted_below=4), "undecided"),
        (interval(-1, 1), at_most(2), "holds"),
        (interval(-1, 3), at_most(2), "undecided"),
        (interval(3, 4), at_most(2), "refuted"),
    ],
)
def test_verdicts(found, prediction, wanted):
    """Breaks when a point estimate decides, or an interval that only touches a range."""
    assert verdict(found, prediction) == wanted


def test_false_results_flip_the_verdict():
    """A swapped label, a shrunken effect, and a single seed. Breaks when a verdict does not follow
    the data."""
    random = np.random.default_rng(1)
    size = {"seeds": 3, "examples": 1000, "tasks": 2, "spread": 0.01}
    ours, theirs = simulated(random, gap=0.1, **size)
    prediction = at_least(0.05, refuted_below=0.0)
    assert verdict(paired_difference(ours, theirs), prediction) == "holds"
    swapped = {task: 1 - scores for task, scores in ours.items()}
    assert verdict(paired_difference(swapped, theirs), prediction) == "refuted"
    less, theirs_now = simulated(random, gap=0.03, **size)
    assert verdict(paired_difference(less, theirs_now), prediction) == "undecided"
    few, few_theirs = simulated(random, gap=0.1, **{**size, "examples": 60, "seeds": 1})
    assert verdict(paired_difference(few, few_theirs), prediction) == "undecided"


def test_a_slope_and_its_interval():
    """Breaks when the draws of two sizes are added in step, as if they were not independent."""
    random = np.random.default_rng(2)
    groups = [
        mean_score({"t": (random.random((1, 400)) < share).astype(float)}, seed=n)
        for n, share in enumerate((0.5, 0.6, 0.7))
    ]
    found = slope([0, 1, 2], groups)
    assert found.value == pytest.approx((groups[2].value - groups[0].value) / 2)
    error = math.sqrt(sum(g.value * (1 - g.value) / 400 for g in (groups[0], groups[2]))) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    with pytest.raises(UserError, match="two different sizes"):
        slope([1, 1], groups[:2])
