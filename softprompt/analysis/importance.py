"""Which hyperparameter of a random search matters most?

A search draws every hyperparameter from a few levels, independently of the others. The share of the
scores' variance that lies between the means of a hyperparameter's levels says how much it matters
on its own.

Source: Fisher 1925, chapter 7, for the share (eta squared); Hutter, Hoos and Leyton-Brown 2014 for
the variance of main effects as the importance of a hyperparameter.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from softprompt.analysis.comparisons import DRAWS, LEVEL, Estimate
from softprompt.errors import UserError


def variance_shares(
    levels: Mapping[str, Sequence[Hashable]],
    scores: Sequence[float],
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Returns the share of the variance of scores between a hyperparameter's levels, for each.

    The draws are resamples of the trials, the same ones for all hyperparameters. Hyperparameters
    should have equally many levels: by chance alone, L levels of N trials reach (L - 1) / (N - 1).

    Args:
        levels: hyperparameter -> its level in each trial.
        scores: of each trial.
        draws: resamples.
        level: of the intervals.
        seed: of the resamples.

    Raises:
        UserError: all scores are equal.
    """
    scores_N = np.asarray(scores, float)
    if np.ptp(scores_N) == 0:
        raise UserError(f"all {len(scores_N)} trials of the search have one score, {scores_N[0]}")
    n, random = len(scores_N), np.random.default_rng(seed)
    counts_DN = random.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    found = {}
    for name, values in levels.items():
        (value,) = _shares(values, scores_N, np.ones((1, n)))
        drawn_D = _shares(values, scores_N, counts_DN)
        low, high = np.quantile(drawn_D, [(1 - level) / 2, (1 + level) / 2])
        found[name] = Estimate(float(value), float(low), float(high), drawn_D)
    return found


def lead(shares: Mapping[str, Estimate], first: str, *, level: float = LEVEL) -> Estimate:
    """Returns the share of a hyperparameter minus the largest one of the others.

    The other one is chosen because it is the largest, so the interval is as wide as for a
    comparison with every other one (Bonferroni).

    Args:
        shares: what `variance_shares` returns, of at least two hyperparameters.
        first: one of them.
        level: of the interval.
    """
    others = {name: share for name, share in shares.items() if name != first}
    ours, second = shares[first], max(others.values(), key=lambda share: share.value)
    tail = (1 - level) / 2 / len(others)
    draws = ours.draws - second.draws
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(ours.value - second.value, float(low), float(high), draws)


def _shares(
    values: Sequence[Hashable],
    scores_N: npt.NDArray[np.floating],
    counts_DN: npt.NDArray[np.floating],
) -> npt.NDArray[np.floating]:
    """The share in each resample, which has each trial so many times; 0 if its scores are equal."""
    names = list(dict.fromkeys(values))
    member_NL = np.array([[value == name for name in names] for value in values], float)
    centred_N = scores_N - scores_N.mean()
    n = counts_DN.sum(1)
    mean_D = counts_DN @ centred_N / n
    size_DL, sum_DL = counts_DN @ member_NL, counts_DN @ (member_NL * centred_N[:, None])
    between_D = (sum_DL**2 / np.maximum(size_DL, 1)).sum(1) - n * mean_D**2
    total_D = counts_DN @ centred_N**2 - n * mean_D**2
    return np.divide(between_D, total_D, out=np.zeros(len(n)), where=total_D > 1e-12)
