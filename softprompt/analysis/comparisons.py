"""Paired differences between methods, with intervals, and verdicts on predictions.

Two methods are compared on the same test examples. Two things are random: which examples a test set
has, which more seeds do not change, and the seeds. The first is resampled, since its distribution
is known from many examples; the second, of which there are three or five, is drawn from Student's
distribution, because resampling three numbers gives intervals that are too narrow.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from softprompt.errors import UserError

# The scores of one task: [seeds, examples], each in [0, 1].
Scores = npt.NDArray[np.floating]

DRAWS = 20_000
LEVEL = 0.95

VERDICTS = ("holds", "refuted", "undecided", "not run")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its interval; `draws` are samples of its distribution."""

    value: float
    low: float
    high: float
    draws: npt.NDArray[np.floating] = dataclasses.field(repr=False, compare=False)


def paired_difference(
    ours: Mapping[str, Scores],
    theirs: Mapping[str, Scores],
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Returns the mean over tasks of ours minus theirs, with its interval.

    Args:
        ours: task -> scores [seeds, examples] of one method, such as 1 for a right answer.
        theirs: the same of the other. Tasks, seeds and examples must be in the same order.
        draws: samples that are drawn.
        level: of the interval.
        seed: of the draws.

    Raises:
        UserError: the two differ in tasks, seeds or examples, or there are none.
    """
    _check_pairs(ours, theirs)
    return mean_score({task: ours[task] - theirs[task] for task in ours}, draws, level, seed)


def mean_score(
    tasks: Mapping[str, Scores], draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """Returns the mean over tasks, seeds and examples of scores, with its interval.

    With one seed the interval is that of the examples alone.

    Source: the bootstrap of examples is Efron and Tibshirani 1993, chapter 13; the degrees of
    freedom of the seeds' variance are Satterthwaite's (1946).
    """
    random = np.random.default_rng(seed)
    count = len(tasks)
    total = np.zeros(draws)
    variances, freedoms = [], []
    for scores_SE in tasks.values():
        seeds, examples = scores_SE.shape
        by_example_E = scores_SE.mean(0)
        total += _resampled_means(random, by_example_E, draws) / count
        if seeds > 1:
            variances.append(_seed_variance(scores_SE) / seeds / count**2)
            freedoms.append(seeds - 1)
    variance = sum(variances)
    if variance > 0:
        terms = (v**2 / n for v, n in zip(variances, freedoms, strict=True))
        freedom = variance**2 / sum(terms)
        total += math.sqrt(variance) * _student(random, freedom, draws)
    value = float(np.mean([scores.mean() for scores in tasks.values()]))
    return estimate(value, total, level)


def contrast(
    weights: Mapping[str, float],
    scores: Mapping[str, Scores],
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Returns a weighted sum of the means of several tasks on which the same trials were tested.

    A seed's effect is common to the tasks, so its variance is that of the seeds' weighted sums; the
    examples of each task are resampled by themselves.

    Args:
        weights: task -> weight.
        scores: task -> [seeds, examples], such as a paired difference. Seeds are the same trials.
        draws: samples that are drawn.
        level: of the interval.
        seed: of the draws.

    Raises:
        UserError: the tasks have different numbers of seeds.
    """
    counts = {len(scores[task]) for task in weights}
    if len(counts) > 1:
        raise UserError(f"a contrast needs the same seeds of each task; there are {sorted(counts)}")
    random, (seeds,) = np.random.default_rng(seed), counts
    total, sums_S, noise = np.zeros(draws), np.zeros(seeds), 0.0
    for task, weight in weights.items():
        total += weight * _resampled_means(random, scores[task].mean(0), draws)
        sums_S += weight * scores[task].mean(1)
        noise += weight**2 * _interaction(scores[task]) / scores[task].shape[1]
    if seeds > 1:
        variance = max(0.0, float(sums_S.var(ddof=1)) - noise) / seeds
        total += math.sqrt(variance) * _student(random, seeds - 1, draws)
    return estimate(float(sums_S.mean()), total, level)


def slope(x: Sequence[float], groups: Sequence[Estimate], *, level: float = LEVEL) -> Estimate:
    """Returns the least-squares slope of estimates over x, with its interval.

    The estimates are taken as independent of one another.

    Raises:
        UserError: fewer than two different values of x.
    """
    if len(set(x)) < 2:
        raise UserError(f"a slope needs two different sizes at least; there are: {sorted(set(x))}")
    centred = np.asarray(x, float) - np.mean(x)
    return weighted_sum(list(centred / (centred**2).sum()), groups, level=level)


def weighted_sum(
    weights: Sequence[float], estimates: Sequence[Estimate], *, level: float = LEVEL
) -> Estimate:
    """Returns a weighted sum of estimates that are independent of one another."""
    pairs = list(zip(weights, estimates, strict=True))
    # Independent: each estimate's draws are in an order of its own.
    draws = sum(
        weight * np.random.default_rng([n, 7]).permutation(one.draws)
        for n, (weight, one) in enumerate(pairs)
    )
    value = sum(weight * one.value for weight, one in pairs)
    return estimate(float(value), np.asarray(draws), level)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What an experiment predicts of a number, and what would refute it.

    Attributes:
        holds: the range in which the prediction says that the number lies.
        refuted: the range in which it is refuted. The two must not overlap; between them nothing is
            decided.
    """

    holds: tuple[float, float]
    refuted: tuple[float, float]

    def __post_init__(self) -> None:
        for low, high in (self.holds, self.refuted):
            if not low <= high:
                raise UserError(f"a range from {low} to {high} is empty")
        if max(self.holds[0], self.refuted[0]) < min(self.holds[1], self.refuted[1]):
            raise UserError(f"the ranges {self.holds} and {self.refuted} overlap")


def at_least(least: float, *, refuted_below: float | None = None) -> Prediction:
    """The number is `least` or more; below `refuted_below` (default `least`) it is refuted."""
    limit = least if refuted_below is None else refuted_below
    return Prediction((least, math.inf), (-math.inf, limit))


def at_most(most: float, *, refuted_above: float | None = None) -> Prediction:
    """The number is `most` or less; above `refuted_above` (default `most`) it is refuted."""
    limit = most if refuted_above is None else refuted_above
    return Prediction((-math.inf, most), (limit, math.inf))


def verdict(found: Estimate | None, prediction: Prediction) -> str:
    """Returns one of `VERDICTS`.

    A prediction holds, or is refuted, if the whole interval lies in the range. No difference
    therefore holds only if the interval lies inside the band that the prediction names: a wide
    interval around zero is undecided.
    """
    if found is None:
        return "not run"
    for name, (low, high) in (("holds", prediction.holds), ("refuted", prediction.refuted)):
        if low <= found.low and found.high <= high:
            return name
    return "undecided"


def _resampled_means(
    random: np.random.Generator, values_E: npt.NDArray[np.floating], draws: int
) -> npt.NDArray[np.floating]:
    """The mean of each of so many samples with replacement, widened for small samples."""
    n = len(values_E)
    # How often each value is drawn decides a mean; equal values are drawn together.
    found, counts = np.unique(values_E, return_counts=True)
    drawn = random.multinomial(n, counts / n, size=draws)
    means = drawn @ found / n
    middle = values_E.mean()
    return np.asarray(middle + small_sample_factor(n) * (means - middle))


def small_sample_factor(n: int) -> float:
    """What deviations of resamples of n units are multiplied by.

    A resample's variance is (n - 1) / n of an unbiased estimate, and its quantiles are the normal
    distribution's, of which Student's are a multiple.
    """
    if n < 2:
        return 1.0
    return float(math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975))


def _student(random: np.random.Generator, freedom: float, draws: int) -> npt.NDArray[np.floating]:
    """Draws of Student's distribution, one from each of so many equally likely intervals.

    With few degrees of freedom the ends of an interval lie far out, where independent draws are few
    and the ends would move with the seed of the draws.
    """
    quantiles = stats.t.ppf((np.arange(draws) + 0.5) / draws, freedom)
    return np.asarray(random.permutation(quantiles))


def _seed_variance(scores_SE: Scores) -> float:
    """The variance of a seed's expected score, at least 0.

    Seeds' means over the same examples differ also because single answers do, which resampling the
    examples already counts: the mean square of the interaction is subtracted.
    Source: Searle, Casella and McCulloch 1992, chapter 4 (two-way crossed, one value a cell).
    """
    within = _interaction(scores_SE) / scores_SE.shape[1]
    return max(0.0, float(scores_SE.mean(1).var(ddof=1)) - within)


def _interaction(scores_SE: Scores) -> float:
    """The variance of single answers that neither the seed nor the example explains."""
    seeds, examples = scores_SE.shape
    means_S, means_E = scores_SE.mean(1, keepdims=True), scores_SE.mean(0, keepdims=True)
    rest_SE = scores_SE - means_S - means_E + scores_SE.mean()
    return float(np.square(rest_SE).sum()) / max(1, (seeds - 1) * max(1, examples - 1))


def estimate(value: float, draws: npt.NDArray[np.floating], level: float = LEVEL) -> Estimate:
    """An estimate whose interval is that of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), draws)


def _check_pairs(ours: Mapping[str, Scores], theirs: Mapping[str, Scores]) -> None:
    if list(ours) != list(theirs) or not ours:
        raise UserError(
            f"a paired comparison needs the same tasks: {list(ours)} and {list(theirs)}"
        )
    for task in ours:
        shapes = [scores[task].shape for scores in (ours, theirs)]
        if shapes[0] != shapes[1] or 0 in shapes[0]:
            raise UserError(
                f"task {task!r}: a paired comparison needs the same seeds and examples; "
                f"there are {shapes[0]} and {shapes[1]}"
            )
