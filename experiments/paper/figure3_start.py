"""Figure 3b: how should a prompt start?

Question: on SmolLM2, how does the score depend on the initialisation?

Prediction, from the paper's Figure 3b: label tokens are at least as good as sampled vocabulary, and
that is at least as good as random uniform. It is refuted if an order is reversed.

Command:
    softprompt sweep paper/figure3_start --workdir runs/paper

Cost: 9 trials on SmolLM2, 48 minutes on two x86 cores beside other work. Three of them are
Figure 1's. On the ladder prompts stay at chance.

Found: 2 undecided. Undecided: a start from labels is at least as good as from vocabulary: 2.7
(-10.3 to 15.6); a start from vocabulary is at least as good as from uniform: 2.9 (-11.0 to 16.7).
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import at_least
from softprompt.analysis.plots import category_plot
from softprompt.config import ConfigDict
from softprompt.results import Row

MODEL = study.SMOLLM2
STARTS = ("uniform", "vocabulary", "labels")

CAPTION = f"{study.SCORE_CAPTION} Prompts of 20 vectors."


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full".

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    return [
        study.trial(MODEL, "prompt", seed, method__init=start)
        for seed in study.SEEDS
        for start in STARTS
    ]


def by_start(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Start -> trials."""
    return study.by_value(study.own(rows, sweep()), "method.init", STARTS)


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""
    found = by_start(rows)
    return [
        study.compared(
            f"a start from {better} is at least as good as from {worse}",
            "class labels are best at small sizes; no difference at XXL",
            found.get(better, []),
            found.get(worse, []),
            at_least(0),
        )
        for better, worse in (("labels", "vocabulary"), ("vocabulary", "uniform"))
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each start."""
    return study.score_table("start", by_start(rows))


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the score by start."""
    points = {start: study.point(0, trials) for start, trials in by_start(rows).items()}
    return category_plot(
        {MODEL: points}, {}, ylabel="Score (points)", title="Figure 3b: initialisation"
    )
