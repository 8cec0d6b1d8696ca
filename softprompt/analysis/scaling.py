"""Fits of a scaling law: loss = E + A N^-a over model sizes, or any other positive axis.

Source: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3: Huber's loss of the difference of
logarithms. Here the start of the search is found by variable projection (Golub and Pereyra 1973):
for a given exponent E and A follow by least squares.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize

from softprompt.analysis.comparisons import LEVEL, Estimate, estimate, small_sample_factor
from softprompt.errors import UserError

Trials = npt.NDArray[np.integer]  # indices
Losses = npt.NDArray[np.floating]  # [trials]

FEWEST = 4  # sizes; three numbers are fitted
HUBER = 1e-2  # of log loss: residuals beyond it count linearly
EXPONENTS = np.geomspace(0.01, 3.0, 25)  # that the search starts from
EXAMPLE_DRAWS = 100  # different resamples of the examples: each is a fit, of some milliseconds
STEEPEST = 10.0  # exponent that is looked for: beyond it all sizes but the smallest are alike


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """loss = floor + scale * size ** -exponent.

    Attributes:
        floor: E, the loss of an infinite model.
        scale: A.
        exponent: a.
        low: of the exponent's interval.
        high: of the exponent's interval.
    """

    floor: float
    scale: float
    exponent: float
    low: float = float("nan")
    high: float = float("nan")

    def __call__(self, sizes: npt.ArrayLike) -> npt.NDArray[np.floating]:
        """The predicted losses."""
        return np.asarray(self.floor + self.scale * np.asarray(sizes, float) ** -self.exponent)


def fit(sizes: npt.ArrayLike, losses: npt.ArrayLike) -> ScalingLaw:
    """Fits a law to losses, of which there may be several at a size.

    Raises:
        UserError: fewer than `FEWEST` different sizes, or numbers that are not positive and finite.
    """
    sizes_N, losses_N = np.asarray(sizes, float), np.asarray(losses, float)
    for name, values in (("size", sizes_N), ("loss", losses_N)):
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if len(wrong):
            raise UserError(f"a {name} is {wrong[0]:g}; allowed: positive numbers")
    if len(set(sizes_N)) < FEWEST:
        raise UserError(
            f"an exponent needs {FEWEST} different sizes at least; there are {len(set(sizes_N))}"
        )
    unit = float(np.exp(np.log(sizes_N).mean()))  # sizes near 1 keep the search well-scaled

    def residuals(parameters: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        floor, scale, exponent = np.exp(parameters)
        return np.asarray(np.log(floor + scale * (sizes_N / unit) ** -exponent) - np.log(losses_N))

    # One search from the best of many starts; each costs a small least-squares problem.
    starts = [_projected(sizes_N / unit, losses_N, exponent) for exponent in EXPONENTS]
    best = min(starts, key=lambda start: float(np.square(residuals(np.log(start))).sum()))
    limits = (-np.inf, [np.inf, np.inf, np.log(STEEPEST)])
    found = optimize.least_squares(
        residuals, np.log(best), loss="huber", f_scale=HUBER, bounds=limits
    )
    floor, scale, exponent = np.exp(found.x)
    return ScalingLaw(float(floor), float(scale * unit**exponent), float(exponent))


def fit_with_interval(
    sizes: Sequence[float],
    losses: npt.ArrayLike,
    clusters: Sequence[object],
    *,
    draws: int = 400,
    level: float = LEVEL,
    seed: int = 0,
) -> ScalingLaw:
    """The same with an interval of the exponent: a bootstrap of whole clusters and of examples.

    Args:
        sizes: of each trial.
        losses: of each trial, [trials]; or of its test examples, which all trials have in common,
            [trials, examples].
        clusters: what trials share across sizes, such as (seed, task): a cluster is drawn whole.
        draws: resamples.
        level: of the interval.
        seed: of the resamples.

    Raises:
        UserError: see `fit`; fewer than two clusters, or one lacks a size.
    """
    sizes_N, losses_NE = np.asarray(sizes, float), _by_example(losses)

    def exponent(some: Trials, losses_N: Losses) -> float:
        return math.log(fit(sizes_N[some], losses_N[some]).exponent)

    law = fit(sizes_N, losses_NE.mean(1))
    found = _over_clusters(exponent, sizes_N, losses_NE, clusters, draws, seed)
    low, high = np.exp(np.quantile(found, [(1 - level) / 2, (1 + level) / 2]))
    return dataclasses.replace(law, low=float(low), high=float(high))


def extrapolation_error(
    sizes: Sequence[float],
    losses: npt.ArrayLike,
    clusters: Sequence[object],
    held_out: float,
    *,
    draws: int = 400,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """How far a law of the other sizes is from the mean loss at one of them.

    Args:
        sizes: of each trial.
        losses: see `fit_with_interval`.
        clusters: see `fit_with_interval`.
        held_out: the size that is predicted.
        draws: resamples.
        level: of the interval.
        seed: of the resamples.

    Returns:
        The predicted loss over the measured one, minus 1, with a bootstrap interval.

    Raises:
        UserError: see `fit_with_interval`; no loss at `held_out`.
    """
    sizes_N, losses_NE = np.asarray(sizes, float), _by_example(losses)
    if held_out not in sizes_N:
        raise UserError(f"no loss is of the held-out size {held_out:g}")

    def error(some: Trials, losses_N: Losses) -> float:
        known = some[sizes_N[some] != held_out]
        law = fit(sizes_N[known], losses_N[known])
        return float(law(held_out) / losses_N[some[sizes_N[some] == held_out]].mean() - 1)

    value = error(np.arange(len(sizes_N)), losses_NE.mean(1))
    return estimate(value, _over_clusters(error, sizes_N, losses_NE, clusters, draws, seed), level)


def _by_example(losses: npt.ArrayLike) -> npt.NDArray[np.floating]:
    """The losses as [trials, examples]; with one for each trial, a single column."""
    array = np.asarray(losses, float)
    return array if array.ndim == 2 else array[:, None]


def _over_clusters(
    statistic: Callable[[Trials, Losses], float],
    sizes_N: npt.NDArray[np.floating],
    losses_NE: npt.NDArray[np.floating],
    clusters: Sequence[object],
    draws: int,
    seed: int,
) -> npt.NDArray[np.floating]:
    """A statistic of resampled clusters and examples, widened for few clusters.

    Its arguments are the trials that were drawn, and the loss of every trial over the examples that
    were drawn.

    Raises:
        UserError: fewer than two clusters, or one lacks a size.
    """
    members: dict[object, list[int]] = {}
    for n, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(n)
    if len(members) < 2:
        raise UserError(f"an interval needs two clusters at least; there are {len(members)}")
    for cluster, some in members.items():
        if lacking := set(sizes_N) - set(sizes_N[some]):
            raise UserError(f"cluster {cluster} has no loss of size {min(lacking):g}")
    groups, (trials, examples) = list(members.values()), losses_NE.shape
    random, losses_N = np.random.default_rng(seed), losses_NE.mean(1)
    drawn_DC = random.integers(len(groups), size=(draws, len(groups)))
    drawn_DC.sort()  # few clusters give few different samples
    different_DC, which_D = np.unique(drawn_DC, axis=0, return_inverse=True)
    members_D = [np.array([i for n in some for i in groups[n]]) for some in different_DC]
    found_D = np.array([statistic(some, losses_N) for some in members_D])[which_D]
    middle = statistic(np.arange(trials), losses_N)
    deviations_D = small_sample_factor(len(groups)) * (found_D - middle)
    if examples > 1:  # which ones a test set has is independent of the clusters
        shares = np.full(examples, 1 / examples)
        means_KN = random.multinomial(examples, shares, size=EXAMPLE_DRAWS) @ losses_NE.T / examples
        others_K = np.array([statistic(np.arange(trials), means_N) for means_N in means_KN])
        others_D = others_K[random.integers(EXAMPLE_DRAWS, size=draws)]
        deviations_D += small_sample_factor(examples) * (others_D - middle)
    return np.asarray(middle + deviations_D)


def _projected(
    sizes_N: npt.NDArray[np.floating], losses_N: npt.NDArray[np.floating], exponent: float
) -> tuple[float, float, float]:
    """The best positive floor and scale for an exponent, by relative errors."""
    terms_N2 = np.stack([np.ones_like(sizes_N), sizes_N**-exponent], axis=1) / losses_N[:, None]
    (floor, scale), _ = optimize.nnls(terms_N2, np.ones_like(losses_N))
    tiny = 1e-6 * float(losses_N.min())
    return max(floor, tiny), max(scale, tiny), exponent
