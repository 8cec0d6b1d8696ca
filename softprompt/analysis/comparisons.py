"""Paired differences between methods, with intervals, and verdicts on predictions.

Two methods are compared on the same test examples. Two things are random and crossed with one
another: which examples a test set has, which more seeds do not change, and the seeds. The variance
of a mean is estimated from both, and its interval is Student's with the degrees of freedom that
they give: few where the seeds decide, many where the examples do.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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

    With one seed the interval is that of the examples alone; with more it is never narrower.

    Source: two-way crossed random effects with one value a cell, Searle, Casella and McCulloch
    1992, chapter 4; the degrees of freedom are Satterthwaite's (1946).
    """
    weight = 1 / len(tasks)
    terms = [_variance_terms(weight * scores_SE) for scores_SE in tasks.values()]
    value = weight * sum(float(scores_SE.mean()) for scores_SE in tasks.values())
    return _student_interval(value, terms, draws, level, seed)


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
    examples of each task are its own.

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
    weighted = [weight * scores[task] for task, weight in weights.items()]
    sums_S = np.sum([scores_SE.mean(1) for scores_SE in weighted], axis=0)
    terms = [_variance_terms(scores_SE)._replace(seeds=NOTHING) for scores_SE in weighted]
    terms.append(VarianceTerms(seeds=_mean_variance(sums_S)))
    return _student_interval(float(sums_S.mean()), terms, draws, level, seed)


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


class Variance(NamedTuple):
    """An estimated variance of a mean, and the degrees of freedom of the estimate."""

    value: float
    freedom: int


NOTHING = Variance(0.0, 1)


class VarianceTerms(NamedTuple):
    """What the variance of a mean over seeds and examples is made of.

    Attributes:
        examples: of the mean over examples, whose scores are means over seeds.
        seeds: of the mean over seeds, whose scores are means over examples.
        both: what the two have in common, and so count twice: the part of single answers that
            neither the seed nor the example explains.
    """

    examples: Variance = NOTHING
    seeds: Variance = NOTHING
    both: Variance = NOTHING


def _variance_terms(scores_SE: Scores) -> VarianceTerms:
    seeds, examples = scores_SE.shape
    means_S, means_E = scores_SE.mean(1), scores_SE.mean(0)
    rest_SE = scores_SE - means_S[:, None] - means_E + scores_SE.mean()
    freedom = (seeds - 1) * (examples - 1)
    rest = float(np.square(rest_SE).sum()) / freedom / rest_SE.size if freedom else 0.0
    both = Variance(rest, freedom) if freedom else NOTHING
    return VarianceTerms(_mean_variance(means_E), _mean_variance(means_S), both)


def _mean_variance(values: npt.NDArray[np.floating]) -> Variance:
    """Of the mean of independent values; nothing is known from a single one."""
    n = len(values)
    return Variance(float(values.var(ddof=1)) / n, n - 1) if n > 1 else NOTHING


def _student_interval(
    value: float, terms: Sequence[VarianceTerms], draws: int, level: float, seed: int
) -> Estimate:
    """An estimate whose variance is the sum of independent terms, at least that of examples.

    All terms count in the degrees of freedom, also where seeds add nothing to the variance: few
    seeds do not show that they never do. Without them intervals are too narrow.
    """
    examples = sum(term.examples.value for term in terms)
    others = sum(term.seeds.value - term.both.value for term in terms)
    variance = examples + max(0.0, others)
    if variance == 0:
        return estimate(value, np.full(draws, value), level)
    squares = sum(part.value**2 / part.freedom for term in terms for part in term)
    random = np.random.default_rng(seed)
    deviations = _student(random, variance**2 / squares, draws)
    return estimate(value, value + math.sqrt(variance) * deviations, level)


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
