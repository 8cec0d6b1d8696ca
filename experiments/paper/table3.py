"""Table 3: is a majority vote of five prompts better than one?

Question: five prompts of one frozen model, trained with five seeds: how do the mean of their
scores, the best by validation, and their majority vote compare?

Prediction, from the paper's Table 3: the vote is at least as good as the mean. It is refuted if it
is below.

Command:
    softprompt sweep paper/table3 --workdir runs/paper

Cost: 5 trials on SmolLM2, of which three are Figure 1's. The vote costs nothing more: the five
prompts' rows are scored in one batch by `softprompt evaluate --run FOLDER FOLDER ...`.

Found: 1 holds. Holds: the majority vote of these five prompts is at least as good as their mean
(points; interval over test examples, not over other prompts): 2.0 (0.4 to 3.6).
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import Estimate, at_least, mean_score
from softprompt.analysis.plots import category_plot
from softprompt.config import ConfigDict
from softprompt.results import Row
from softprompt.trials.records import vote

MODEL = study.SMOLLM2
MEMBERS = (0, 1, 2, 3, 4)

CAPTION = (
    "Score in points, 0 for the most frequent label, with its 95 % interval over test examples, "
    "and for the mean also over seeds. Best: the prompt with the best validation accuracy. Of "
    "labels with equally many votes, the one wins that the best of their prompts voted for."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full".

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    return [study.trial(MODEL, "prompt", seed) for seed in MEMBERS]


def members(rows: Sequence[Row]) -> list[Row]:
    """The five trials, the best by validation first; [] if one is missing."""
    found = study.select(study.own(rows, sweep()))
    ordered = sorted(found, key=lambda row: -row["metrics"]["validation"]["accuracy"])
    return ordered if len(ordered) == len(MEMBERS) else []


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction, and what was found."""
    prompts, lead = members(rows), None
    if study.above_chance(*([one] for one in prompts)):
        scores_ME = study.scores(prompts)[study.TASK]
        ahead_1E = vote(prompts, study.TASK) - scores_ME.mean(0, keepdims=True)
        lead = study.in_points(mean_score({study.TASK: ahead_1E}))
    return [
        study.Finding(
            "the majority vote of these five prompts is at least as good as their mean (points; "
            "interval over test examples, not over other prompts)",
            "SuperGLUE at XXL: mean 90.5, best 91.0, vote 91.3",
            lead,
            at_least(0),
            len(prompts),
        )
    ]


def ways(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The scores of the mean, the best and the vote."""
    prompts = members(rows)
    if not prompts:
        return {}
    best = study.scores(prompts[:1])
    found = {
        "mean": study.mean(prompts),
        "best by validation": study.in_points(mean_score(best)),
        "vote": study.in_points(mean_score({study.TASK: vote(prompts, study.TASK)})),
    }
    return {name: one for name, one in found.items() if one}


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each way to use five prompts."""
    return pd.DataFrame(
        [{"five prompts": name, "score": study.shown(one)} for name, one in ways(rows).items()]
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the scores side by side."""
    series = {MODEL: {name: study.estimate_point(one) for name, one in ways(rows).items()}}
    return category_plot(series, {}, ylabel="Score (points)", title="Table 3: a vote of five")
