"""Table 6: which hyperparameter of a prompt matters most?

Question: in a random search over eight hyperparameters of a prompt, three values each, what share
of the scores' variance does each one explain?

Prediction: the learning rate explains the largest share, as the paper's search, whose widest range
is the rate's, suggests. It is refuted if another one explains more.

Command:
    softprompt sweep paper/table6 --workdir runs/paper
    softprompt sweep paper/table6 --subset d1 --workdir runs/paper

Cost: 33 trials on d1 of half a minute on one core, and 33 on SmolLM2 ("smollm2") of about two.

Found: 2 undecided. Undecided: the rate explains more than any other hyperparameter at d1 (% of
variance); the rate explains more than any other hyperparameter at smollm2 (% of variance): 4.2
(-37.6 to 44.1). The search on SmolLM2 has 24 of its 33 trials.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import Estimate, at_least
from softprompt.analysis.importance import lead, variance_shares
from softprompt.analysis.plots import category_plot
from softprompt.config import ConfigDict
from softprompt.errors import unknown
from softprompt.results import Row

MODELS = {"d1": "ladder/d1", "smollm2": study.SMOLLM2}
COUNT = 33
LEAST = 24  # finished trials of a model, without which there is no verdict

# Each hyperparameter's values, the usual one last. Rate, steps and batch are parts of the usual
# ones of a model, the warm-up is one of the steps.
LEVELS: dict[str, tuple[Any, ...]] = {
    "rate": (0.1, 10, 1),
    "steps": (0.25, 0.5, 1),
    "batch": (0.25, 0.5, 1),
    "length": (5, 80, 20),
    "start": ("uniform", "vocabulary", "labels"),
    "schedule": ("constant", "linear", "cosine"),
    "warm-up": (0, 0.3, 0.1),
    "weight decay": (0.1, 0.01, 0),
}

CAPTION = (
    "The share of the variance of test scores between the means of a hyperparameter's three values "
    "(eta squared), with its 95 % interval over resampled trials. By chance alone it is "
    f"{200 / (COUNT - 1):.0f} %. Each trial has its own seed. Rate, steps and batch are multiples "
    "of the usual ones. The lead of one hyperparameter has an interval that allows for its "
    "comparison with seven (Bonferroni); a search whose mean score is at chance decides nothing."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full", or of one model, "d1" or "smollm2".

    Raises:
        UserError: another subset.
    """
    subsets = {"full": tuple(MODELS.values())} | {name: (one,) for name, one in MODELS.items()}
    if subset not in subsets:
        raise unknown("subset", subset, subsets)
    return [
        config(model, seed, drawn)
        for model in subsets[subset]
        for seed, drawn in enumerate(settings())
    ]


def settings() -> list[dict[str, Any]]:
    """The values of each trial: each value is in equally many, and drawn apart from the others."""
    random = np.random.default_rng(6)
    order = {name: random.permutation(np.arange(COUNT) % len(LEVELS[name])) for name in LEVELS}
    return [{name: values[order[name][n]] for name, values in LEVELS.items()} for n in range(COUNT)]


def config(model: str, seed: int, drawn: dict[str, Any]) -> ConfigDict:
    """The trial with these values."""
    usual = study.trial(model, "prompt")
    steps = int(drawn["steps"] * usual.train.steps)
    return study.trial(
        model,
        "prompt",
        seed,
        optimizer__rate=drawn["rate"] * usual.optimizer.rate,
        optimizer__schedule=drawn["schedule"],
        optimizer__warmup=int(drawn["warm-up"] * steps),
        optimizer__weight_decay=float(drawn["weight decay"]),
        train__steps=steps,
        train__batch=max(1, int(drawn["batch"] * usual.train.batch)),
        eval__every=max(1, steps // 4),
        method__length=drawn["length"],
        method__init=drawn["start"],
    )


def trials(rows: Sequence[Row], subset: str) -> list[Row]:
    """The finished trials of a model, in the order of `settings`, whose index is the seed."""
    return study.select(study.own(rows, sweep(subset)))


def shares(found: Sequence[Row]) -> dict[str, Estimate]:
    """Hyperparameter -> its share of the variance, in %; {} for few trials or one score."""
    scores = [float(study.scores([row])[study.TASK].mean()) for row in found]
    if len(found) < LEAST or len(set(scores)) == 1:
        return {}
    levels = {name: values(found, name) for name in LEVELS}
    return {n: study.in_points(share) for n, share in variance_shares(levels, scores).items()}


def values(found: Sequence[Row], name: str) -> list[Any]:
    """The value of a hyperparameter in each trial."""
    drawn = settings()
    return [drawn[study.value(row, "seed")][name] for row in found]


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction for each model, and what was found."""
    made = []
    for subset in MODELS:
        found = trials(rows, subset)
        some = shares(found)
        made.append(
            study.Finding(
                f"the rate explains more than any other hyperparameter at {subset} (% of variance)",
                "the search has rates from 0.001 to 0.5, and chooses 0.3",
                lead(some, "rate") if some and study.above_chance(found) else None,
                at_least(0),
                len(found),
            )
        )
    return made


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each model and hyperparameter, with the mean score at each value."""
    lines = []
    for subset, model in MODELS.items():
        found = trials(rows, subset)
        for name, share in shares(found).items():
            line = {"model": model, "trials": len(found), "hyperparameter": name}
            line |= {"share of variance (%)": study.shown(share)}
            lines.append(line | {"mean score at": score_by_value(found, name)})
    return pd.DataFrame(lines)


def score_by_value(found: Sequence[Row], name: str) -> str:
    """The mean score at each value of a hyperparameter, as text."""
    drawn = values(found, name)
    groups = {
        value: [row for row, one in zip(found, drawn, strict=True) if one == value]
        for value in LEVELS[name]
    }
    means = {value: study.mean(some) for value, some in groups.items()}
    return ", ".join(f"{value}: {one.value:.1f}" for value, one in means.items() if one)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the shares side by side, for each model that has some."""
    found = {model: shares(trials(rows, subset)) for subset, model in MODELS.items()}
    series = {
        model: {name: study.estimate_point(share) for name, share in some.items()}
        for model, some in found.items()
        if some
    }
    return category_plot(series, {}, ylabel="Share of variance (%)", title="Table 6: random search")
