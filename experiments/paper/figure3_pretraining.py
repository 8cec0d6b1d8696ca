"""Figures 3c and 3d: does LM adaptation make a T5 easier to prompt?

Question: how does the score of a prompt on a small T5 depend on its pretraining: span corruption,
the same with a sentinel before every target, or LM adaptation for 10, 50 and 100 % of its steps?

Prediction, from the paper's Figures 3c and 3d: LM adaptation is ahead of span corruption by at
least 4 points, a sentinel recovers less than half of that, and longer adaptation is better. It is
refuted if LM adaptation is behind, the sentinel recovers more than half, or the order is reversed.

Command:
    softprompt sweep paper/figure3_pretraining --workdir runs/paper

Cost: 30 trials on t0, of a minute and a half on one core.

Found: 3 undecided. Undecided: LM adaptation is at least 4 points ahead of span corruption; a
sentinel gains less than half of that lead, if there is one (points above the half); 100 % of the
adaptation is at least as good as 10 %.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import Estimate, at_least, at_most, mean_score
from softprompt.analysis.plots import category_plot
from softprompt.config import ConfigDict
from softprompt.data.builtin_tasks import TASKS
from softprompt.results import Row

SENTINEL = "<extra_id_0>"
PLAIN, FULL = "span corruption", "LM 100 %"
WITH_SENTINEL = "with sentinel"
STATES = {
    PLAIN: "ladder/t0@lm0",
    WITH_SENTINEL: "ladder/t0@lm0",
    "LM 10 %": "ladder/t0@lm10",
    "LM 50 %": "ladder/t0@lm50",
    FULL: "ladder/t0@lm100",
}

CAPTION = (
    f"{study.SCORE_CAPTION} Prompts of 20 vectors from the vocabulary, in the encoder's input."
)


def configs(state: str) -> list[ConfigDict]:
    """The trials of a state of pretraining."""
    return [
        study.trial(STATES[state], "prompt", seed, **keys(state, task))
        for task in study.TASKS
        for seed in study.SEEDS
    ]


def keys(state: str, task: str) -> dict[str, Any]:
    """Keys of a trial. It starts from the vocabulary: labels would have the sentinel in them."""
    found: dict[str, Any] = {"task__name": task, "method__init": "vocabulary"}
    if state == WITH_SENTINEL:
        usual = TASKS[task].verbalizers.items()
        found["task__verbalizers"] = {label: f"{SENTINEL}{text}" for label, text in usual}
    return found


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full".

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    return [config for state in STATES for config in configs(state)]


def by_state(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """State of pretraining -> trials, of those that have some."""
    found = {state: study.select(study.own(rows, configs(state))) for state in STATES}
    return study.on_common_tasks({state: trials for state, trials in found.items() if trials})


def above_half(found: Mapping[str, Sequence[Row]]) -> tuple[Estimate | None, int]:
    """The sentinel's gain minus half of LM adaptation's lead, and its number of seeds.

    None without a lead whose interval is above 0, since half of it means nothing then.
    """
    states = [study.keyed(found.get(state, [])) for state in (PLAIN, WITH_SENTINEL, FULL)]
    common = sorted(set.intersection(*map(set, states)))
    plain, sentinel, full = ([trials[key] for key in common] for trials in states)
    lead = study.difference(study.pairs(full, plain))
    if lead is None or lead.low <= 0:
        return None, study.seed_count(full)
    low, middle, high = (study.scores(trials) for trials in (plain, sentinel, full))
    gain = mean_score({task: middle[task] - (low[task] + high[task]) / 2 for task in middle})
    return study.in_points(gain), study.seed_count(full)


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""
    found = by_state(rows)

    def paired(ours: str, theirs: str) -> list[tuple[Row, Row]]:
        return study.pairs(found.get(ours, []), found.get(theirs, []))

    lead, longer = paired(FULL, PLAIN), paired(FULL, "LM 10 %")
    above, seeds = above_half(found)
    learnt = study.above_chance(*found.values())
    return [
        study.Finding(
            "LM adaptation is at least 4 points ahead of span corruption",
            "span corruption scores 0 on some tasks at Base, Large and XL",
            study.difference(lead) if learnt else None,
            at_least(4, refuted_below=0),
            study.seed_count([one for one, _ in lead]),
        ),
        study.Finding(
            "a sentinel gains less than half of that lead, if there is one (points above the half)",
            "the sentinel barely helps",
            above,
            at_most(0),
            seeds,
        ),
        study.Finding(
            "100 % of the adaptation is at least as good as 10 %",
            "longer is better",
            study.difference(longer) if learnt else None,
            at_least(0),
            study.seed_count([one for one, _ in longer]),
        ),
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each state of pretraining."""
    return study.score_table("pretraining", by_state(rows))


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the score for each state of pretraining."""
    series = {"t0": {state: study.point(0, trials) for state, trials in by_state(rows).items()}}
    return category_plot(
        series, {}, ylabel="Score (points)", title="Figures 3c and 3d: pretraining of a small T5"
    )
