"""A control of Figure 1: are small models behind because their prompts are trained too little?

Question: how much does a prompt on a rung of the ladder gain from four times the steps?

Prediction: at most 3 points. It is refuted if it gains more: then a part of Figure 1's gap is
missing training. It counts where prompts are at chance too: then they have learnt nothing more.

Command:
    softprompt sweep paper/steps --workdir runs/paper

Cost: 6 trials of 1,600 steps on d1, of three minutes on one core, and Figure 1's.

Found: 1 undecided. Undecided: four times the steps gain at most 3 points at d1: 1.2 (-3.1 to 5.4).
Both are at chance.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import at_most
from softprompt.analysis.plots import length_plot
from softprompt.config import ConfigDict
from softprompt.results import Row

MODEL = "ladder/d1"
USUAL, MORE = study.LADDER_STEPS[0], 4 * study.LADDER_STEPS[0]

CAPTION = f"{study.SCORE_CAPTION} Prompts of 20 vectors."


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full".

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    more = {"train__steps": MORE, "optimizer__warmup": MORE // 10, "eval__every": MORE // 4}
    return [
        study.trial(MODEL, "prompt", seed, task__name=task, **keys)
        for task in study.TASKS
        for seed in study.SEEDS
        for keys in ({}, more)
    ]


def by_steps(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Steps -> trials."""
    found = study.by_value(study.own(rows, sweep()), "train.steps", (USUAL, MORE))
    return study.on_common_tasks(found)


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction, and what was found."""
    found = by_steps(rows)
    return [
        study.compared(
            "four times the steps gain at most 3 points at d1",
            "SuperGLUE at Base: 63.1 after 30,000 steps, 66.6 after 262,144 (Vu et al. 2022)",
            found.get(MORE, []),
            found.get(USUAL, []),
            at_most(3),
            at_chance=True,
        )
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each number of steps."""
    return study.score_table("steps", by_steps(rows))


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the score by steps."""
    line = [study.point(steps, trials) for steps, trials in by_steps(rows).items()]
    return length_plot(
        {"prompt": line}, {}, xlabel="Steps", ylabel="Score (points)", title="Steps at d1"
    )
