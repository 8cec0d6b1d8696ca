"""Figure 3a: how long must a prompt be?

Question: on SmolLM2, how does the score depend on the number of prompt vectors?

Prediction, from the paper's Figure 3a: one vector is worse than 20, and 100 gain little over 20. It
is refuted if one is ahead, or if 100 are ahead by more than 2 points.

Command:
    softprompt sweep paper/figure3_length --workdir runs/paper

Cost: 15 trials on SmolLM2, 73 minutes on two x86 cores beside other work. Three of them are
Figure 1's. On the ladder prompts stay at chance.

Found: 1 holds, 1 undecided. Holds: 20 vectors are better than one: 13.2 (5.9 to 20.5). Undecided:
100 vectors gain at most 2 points over 20: -1.2 (-9.6 to 7.3).
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import at_least, at_most
from softprompt.analysis.plots import length_plot
from softprompt.config import ConfigDict
from softprompt.results import Row

MODEL = study.SMOLLM2
LENGTHS = (1, 5, 20, 100, 150)

CAPTION = f"{study.SCORE_CAPTION} Prompts start from label tokens."


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full".

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    return [
        study.trial(MODEL, "prompt", seed, method__length=length)
        for seed in study.SEEDS
        for length in LENGTHS
    ]


def by_length(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Length -> trials."""
    return study.by_value(study.own(rows, sweep()), "method.length", LENGTHS)


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""
    found = by_length(rows)
    one, usual, long = (found.get(length, []) for length in (1, 20, 100))
    return [
        study.compared(
            "20 vectors are better than one",
            "more than one matters, except at XXL",
            usual,
            one,
            at_least(0),
        ),
        study.compared(
            "100 vectors gain at most 2 points over 20",
            "beyond 20 little is gained",
            long,
            usual,
            at_most(2),
        ),
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each length."""
    return study.score_table("length", by_length(rows))


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the score by length."""
    found = by_length(rows)
    line = [study.point(length, trials) for length, trials in found.items()]
    return length_plot(
        {"prompt": line},
        {},
        xlabel="Prompt length (vectors)",
        ylabel="Score (points)",
        title="Figure 3a: prompt length",
    )
