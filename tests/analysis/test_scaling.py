"""Fits of scaling laws, on data whose law is known."""

import numpy as np
import pytest

from softprompt.analysis.scaling import extrapolation_error, fit, fit_with_interval
from softprompt.errors import UserError

SIZES = np.array([1.1e5, 3.3e5, 9.5e5, 2.4e6, 7.4e6, 1.06e8])


@pytest.mark.parametrize(
    ("floor", "scale", "exponent"), [(1.7, 40.0, 0.3), (0.2, 8.0, 0.12), (0.5, 900.0, 0.6)]
)
def test_the_law_is_found(floor, scale, exponent):
    """Breaks when the search ends in another minimum, or an axis of another unit moves it."""
    losses = floor + scale * SIZES**-exponent
    law = fit(SIZES, losses)
    np.testing.assert_allclose(
        [law.floor, law.scale, law.exponent], [floor, scale, exponent], rtol=1e-3
    )
    np.testing.assert_allclose(law(SIZES), losses, rtol=1e-6)


def test_one_wrong_loss_does_not_decide():
    """Breaks when residuals are squared however large they are."""
    losses = 1.7 + 40.0 * SIZES**-0.3
    losses[2] *= 1.5
    repeated = np.tile(1.7 + 40.0 * SIZES**-0.3, 3)
    law = fit(np.tile(SIZES, 4), [*repeated, *losses])
    assert law.exponent == pytest.approx(0.3, rel=0.02)


def test_the_interval_covers_the_exponent():
    """Breaks when trials of one cluster are drawn one by one: then it is too narrow."""
    random, covered, runs = np.random.default_rng(0), 0, 24
    for run in range(runs):
        sizes, losses, clusters = [], [], []
        for cluster in range(9):
            level = random.normal(0, 0.05)  # common to a task and seed, at every size
            for size in SIZES:
                loss = (1.0 + 30.0 * size**-0.25) * np.exp(level + random.normal(0, 0.01))
                sizes.append(size), losses.append(loss), clusters.append(cluster)
        law = fit_with_interval(sizes, losses, clusters, draws=40, seed=run)
        covered += law.low <= 0.25 <= law.high
    assert covered >= 20  # 95 % by its name, of 24


def simulate(random, clusters):
    """Sizes, losses and clusters, of which each has a level of its own."""
    columns = [], [], []
    for cluster in range(clusters):
        level = random.normal(0, 0.03)
        for size in SIZES:
            loss = (1.0 + 30.0 * size**-0.25) * np.exp(level + random.normal(0, 0.01))
            for column, value in zip(columns, (size, loss, cluster), strict=True):
                column.append(value)
    return columns


def test_intervals_of_few_clusters():
    """Breaks when three clusters give an interval as if they were many."""
    random, exponents, errors, runs = np.random.default_rng(2), 0, 0, 24
    for _ in range(runs):
        data = simulate(random, 3)
        law, error = fit_with_interval(*data), extrapolation_error(*data, SIZES[-1])
        exponents += law.low <= 0.25 <= law.high
        errors += error.low <= 0 <= error.high
    assert min(exponents, errors) >= 21


def test_an_interval_of_two_clusters_is_widened():
    """Breaks when two clusters give an interval that ends at what one of them says alone."""
    sizes, losses, clusters = simulate(np.random.default_rng(4), 2)
    found = extrapolation_error(sizes, losses, clusters, SIZES[-1])
    each = []
    for one in range(2):
        alone = [loss for loss, cluster in zip(losses, clusters, strict=True) if cluster == one] * 2
        each.append(extrapolation_error(sizes, alone, clusters, SIZES[-1]).value - found.value)
    factor = 2**0.5 * 12.706 / 1.960  # Student's interval of one degree of freedom over the normal
    ends = [found.low - found.value, found.high - found.value]
    assert ends == pytest.approx([factor * min(0, *each), factor * max(0, *each)], rel=1e-3)


def test_examples_count_too():
    """Breaks when seeds that agree leave an interval without width, though test sets differ."""
    random = np.random.default_rng(0)
    losses_NE = (1.0 + 30.0 * SIZES**-0.25)[:, None] * random.gamma(4, 0.25, (len(SIZES), 300))
    twice, clusters = np.tile(losses_NE, (2, 1)), [n for n in (0, 1) for _ in SIZES]
    sizes = np.tile(SIZES, 2).tolist()
    held_out = [
        extrapolation_error(sizes, losses, clusters, SIZES[-1]) for losses in (twice, twice.mean(1))
    ]
    assert held_out[1].high == held_out[1].low == pytest.approx(held_out[0].value)
    # The measured loss alone: the spread of a mean of 300 examples, half of a single one's mean.
    assert held_out[0].high - held_out[0].low > 2 * 1.96 * 0.5 / 300**0.5
    law, same = (fit_with_interval(sizes, losses, clusters) for losses in (twice, twice.mean(1)))
    assert same.high - same.low < 1e-9 < law.high - law.low


def test_the_held_out_size_decides_nothing():
    """Breaks when the law is fitted to the loss that it predicts, or the error has no sign."""
    sizes, losses, clusters = simulate(np.random.default_rng(3), 3)
    exact = [1.0 + 30.0 * size**-0.25 for size in sizes]
    assert extrapolation_error(sizes, exact, clusters, SIZES[-1]).value == pytest.approx(
        0, abs=1e-4
    )
    higher = [
        2 * loss if size == SIZES[-1] else loss for size, loss in zip(sizes, exact, strict=True)
    ]
    found = extrapolation_error(sizes, higher, clusters, SIZES[-1])
    assert (found.value, found.high) == pytest.approx((-0.5, -0.5), abs=1e-4)


def test_a_loss_that_falls_once():
    """Breaks when the exponent runs away where all sizes but the smallest are alike."""
    law = fit(SIZES, [2.0, *[1.0] * (len(SIZES) - 1)])
    assert law.exponent <= 10
    assert law(SIZES)[0] == pytest.approx(2, rel=0.01)


def test_refusals():
    """Breaks when an exponent comes from too few sizes, or of numbers that have no logarithm."""
    with pytest.raises(UserError, match="4 different sizes at least; there are 3"):
        fit([1, 2, 3, 3], [3, 2, 1, 1])
    with pytest.raises(UserError, match="a loss is -1; allowed: positive"):
        fit([1, 2, 3, 4], [3, 2, 1, -1])
    with pytest.raises(UserError, match="two clusters"):
        fit_with_interval([1, 2, 3, 4], [4, 3, 2, 1], [0, 0, 0, 0])
    with pytest.raises(UserError, match="cluster b has no loss of size 4"):
        fit_with_interval([1, 2, 3, 4, 1, 2, 3], [4, 3, 2, 1, 4, 3, 2], [*"aaaabbb"])
    with pytest.raises(UserError, match="no loss is of the held-out size 5"):
        extrapolation_error([1, 2, 3, 4], [4, 3, 2, 1], [0, 0, 1, 1], 5)
