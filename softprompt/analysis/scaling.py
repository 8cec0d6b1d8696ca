"""Fits of a scaling law: loss = E + A N^-a over model sizes, or any other positive axis.

Source: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3: Huber's loss of the difference of
logarithms. Here the start of the search is found by variable projection (Golub and Pereyra 1973):
for a given exponent E and A follow by least squares.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize

from softprompt.errors import UserError

FEWEST = 4  # sizes; three numbers are fitted
HUBER = 1e-2  # of log loss: residuals beyond it count linearly
EXPONENTS = np.geomspace(0.01, 3.0, 25)  # that the search starts from


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
    found = optimize.least_squares(residuals, np.log(best), loss="huber", f_scale=HUBER)
    floor, scale, exponent = np.exp(found.x)
    return ScalingLaw(float(floor), float(scale * unit**exponent), float(exponent))


def fit_with_interval(
    sizes: Sequence[float],
    losses: Sequence[float],
    clusters: Sequence[object],
    *,
    draws: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> ScalingLaw:
    """The same with an interval of the exponent: a bootstrap of whole clusters.

    Args:
        sizes: of each loss.
        losses: one a trial.
        clusters: what trials share across sizes, such as (seed, task): a cluster is drawn whole.
        draws: resamples.
        level: of the interval.
        seed: of the resamples.

    Raises:
        UserError: see `fit`; fewer than two clusters.
    """
    members: dict[object, list[int]] = {}
    for n, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(n)
    if len(members) < 2:
        raise UserError(f"an interval needs two clusters at least; there are {len(members)}")
    sizes_N, losses_N = np.asarray(sizes, float), np.asarray(losses, float)
    groups, random = list(members.values()), np.random.default_rng(seed)
    law, exponents = fit(sizes_N, losses_N), []
    # Deviations of so few clusters are widened as in `comparisons`: by n / (n - 1) in variance.
    scale = np.sqrt(len(groups) / (len(groups) - 1))
    for _ in range(draws):
        drawn = random.integers(len(groups), size=len(groups))
        some = np.concatenate([groups[n] for n in drawn])
        if len(set(sizes_N[some])) >= FEWEST:
            exponents.append(fit(sizes_N[some], losses_N[some]).exponent)
    logs = np.log(law.exponent) + scale * (np.log(exponents) - np.log(law.exponent))
    low, high = np.exp(np.quantile(logs, [(1 - level) / 2, (1 + level) / 2]))
    return dataclasses.replace(law, low=float(low), high=float(high))


def _projected(
    sizes_N: npt.NDArray[np.floating], losses_N: npt.NDArray[np.floating], exponent: float
) -> tuple[float, float, float]:
    """The best positive floor and scale for an exponent, by relative errors."""
    terms_N2 = np.stack([np.ones_like(sizes_N), sizes_N**-exponent], axis=1) / losses_N[:, None]
    (floor, scale), _ = optimize.nnls(terms_N2, np.ones_like(losses_N))
    tiny = 1e-6 * float(losses_N.min())
    return max(floor, tiny), max(scale, tiny), exponent
