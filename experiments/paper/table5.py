"""Table 5: do longer prompts take longer to converge?

Question: after how many seconds of training is a prompt within 1 point of validation accuracy of
the best that it reaches, by its length?

Prediction, from the paper's Table 5: the time grows with the length. It is refuted if 100 vectors
need less time than one.

Command:
    softprompt sweep paper/figure3_length --workdir runs/paper

Cost: none of its own. The trials are those of Figure 3a. Validation comes a quarter of the
steps apart, and a time is exact to that. The machine had other work meanwhile: the intervals are
wide, and some begin at a negative time.

Found: 1 undecided. Undecided: 100 vectors take longer than one to come within 1 point of their best
(seconds): 9.3 (-54.4 to 73.0). The times come from a machine with other work.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import figure3_length, study
from softprompt.analysis.comparisons import at_least, mean_score, paired_difference
from softprompt.analysis.plots import Point, length_plot
from softprompt.results import Row

WITHIN = 0.01  # of validation accuracy

CAPTION = (
    "Seconds of training (without validation and compilation) until validation accuracy is within "
    "1 point of a trial's best, the mean over seeds, with small marks for seeds. The machine had "
    "other work, which lengthens them, for some trials more than for others. Intervals are "
    "Student's over three seeds and may begin below zero, where no time is."
)


def seconds(row: Row) -> float:
    """The seconds until a trial is within `WITHIN` of its best."""
    curve = row["curve"]
    best = max(value for _, _, value in curve)
    return float(next(spent for _, spent, value in curve if value >= best - WITHIN))


def by_length(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Length -> the trials that were timed alone: those of a group share the processor."""
    found = {
        length: [row for row in trials if row.get("curve") and row.get("members", 1) == 1]
        for length, trials in figure3_length.by_length(rows).items()
    }
    return {length: trials for length, trials in found.items() if trials}


def times(trials: Sequence[Row]) -> np.ndarray:
    """The seconds of each trial, [trials, 1]."""
    return np.array([[seconds(row)] for row in trials])


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction, and what was found."""
    found, more = by_length(rows), None
    paired = study.pairs(found.get(100, []), found.get(1, []))
    if paired:
        long, one = (times(trials) for trials in zip(*paired, strict=True))
        more = paired_difference({"": long}, {"": one})
    return [
        study.Finding(
            "100 vectors take longer than one to come within 1 point of their best (seconds)",
            "BoolQ at XXL: 21 minutes with one vector, 3 hours 51 minutes with 100",
            more,
            at_least(0),
            len(paired),
        )
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each length."""
    return pd.DataFrame(
        [
            {
                "length": length,
                "seeds": len(some),
                "seconds": study.shown(mean_score({"": times(some)})),
            }
            for length, some in by_length(rows).items()
        ]
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the seconds by length."""
    line = []
    for length, some in by_length(rows).items():
        one = mean_score({"": times(some)})
        line.append(Point(length, one.value, one.low, one.high, tuple(times(some)[:, 0])))
    return length_plot(
        {"prompt": line},
        {},
        xlabel="Prompt length (vectors)",
        ylabel="Seconds",
        title="Table 5: time to 1 point below the best",
    )
