"""Outcomes of A/B aliases: appended as JSON lines, and compared arm by arm.

What is compared are users: a user's outcomes are not independent of one another, so their mean is
one observation. An outcome without a user is one of its own.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from softprompt.analysis.tables import LEVEL, Interval, wilson_interval
from softprompt.errors import UserError

FILE = "outcomes.jsonl"
KEYS = ("alias", "arm", "baseline", "user", "value")
Outcome = dict[str, Any]


def append_outcome(folder: str | os.PathLike[str], outcome: Outcome) -> None:
    """Appends an outcome to a folder's file in one write, so that several servers may share it.

    Args:
        folder: that holds the tasks.
        outcome: {"alias", "arm", "baseline": the arm to compare with, "user", "value": a number}.
            Of the user only a digest is kept.

    Raises:
        UserError: the file cannot be written.
    """
    user = outcome["user"]
    digest = hashlib.sha256(f"{outcome['alias']}\0{user}".encode()).hexdigest()[:16]
    line = {"time": round(time.time(), 3), **outcome, "user": digest if user else ""}
    file = Path(folder) / FILE
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(line, allow_nan=False) + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def read_outcomes(folder: str | os.PathLike[str]) -> list[Outcome]:
    """The outcomes of a folder; [] if it has none.

    Raises:
        UserError: a line is not an outcome.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            one = json.loads(line)
            good = all(isinstance(one[key], str) for key in KEYS[:-1])
            good = good and math.isfinite(one["value"])
        except (ValueError, TypeError, KeyError):
            good = False
        if not good:
            raise UserError(f"{file}, line {number}: not an outcome with {', '.join(KEYS)}")
        found.append(one)
    return found


def compare_arms(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One line an arm: outcomes, users, mean, interval, and the difference from the baseline.

    The interval of a mean is Wilson's where every user's mean is 0 or 1, else Student's (None for
    one user). That of a difference combines the distances from both means to their limits.
    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures".
    """
    users: dict[tuple[str, str], dict[str, list[float]]] = {}
    baselines = {one["alias"]: one["baseline"] for one in outcomes}  # the latest
    for number, one in enumerate(outcomes):
        of_arm = users.setdefault((one["alias"], one["arm"]), {})
        of_arm.setdefault(one["user"] or f"outcome {number}", []).append(one["value"])
    means = {key: [float(np.mean(values)) for values in by.values()] for key, by in users.items()}
    lines = []
    for alias, arm in sorted(means, key=lambda one: (one[0], one[1] != baselines[one[0]], one[1])):
        values = means[alias, arm]
        low, high = interval(values) or (None, None)
        line = {"alias": alias, "arm": arm, "n": sum(map(len, users[alias, arm].values()))}
        line |= {"users": len(values), "mean": float(np.mean(values)), "low": low, "high": high}
        base = means.get((alias, baselines[alias])) if arm != baselines[alias] else None
        lines.append(line | _difference(values, base))
    return pd.DataFrame(lines, dtype=object)


def interval(values: Sequence[float]) -> Interval | None:
    """The interval of a mean; None where one value tells nothing of the spread."""
    mean, count = float(np.mean(values)), len(values)
    if set(values) <= {0.0, 1.0}:
        return wilson_interval(mean, count)
    if count < 2:
        return None
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * float(stats.sem(values))
    return mean - half, mean + half


def _difference(values: Sequence[float], base: Sequence[float] | None) -> dict[str, Any]:
    """The difference of two means with its limits, as far as they are known."""
    names = ("difference", "difference low", "difference high")
    if base is None:
        return dict.fromkeys(names)
    mean, other = float(np.mean(values)), float(np.mean(base))
    ours, theirs = interval(values), interval(base)
    if ours is None or theirs is None:
        return dict(zip(names, (mean - other, None, None), strict=True))
    below = math.hypot(mean - ours[0], theirs[1] - other)
    above = math.hypot(ours[1] - mean, other - theirs[0])
    return dict(zip(names, (mean - other, mean - other - below, mean - other + above), strict=True))
