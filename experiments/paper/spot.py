"""SPoT: does a prompt that was trained on one task help another?

Question: on SmolLM2 and with 100 examples, how many points does a prompt gain on product reviews,
and on questions as the control, when it starts from a prompt for movie snippets and not from the
task's labels?

Prediction: on product reviews it gains, and on questions it gains at most 3 points. The first is
refuted if it loses, the second if it gains more.

Command:
    softprompt sweep paper/spot --workdir runs/paper

Cost: 12 trials on SmolLM2 of about 3 minutes on one core, and three of Figure 1's, which the sweep
runs first.

Found: 2 undecided. Undecided: from a movie prompt amazon_sentiment gains: 2.5 (-0.4 to 5.4); from a
movie prompt question_type gains at most 3 points: 2.3 (-6.8 to 11.5).
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import at_least, at_most
from softprompt.analysis.plots import category_plot
from softprompt.config import ConfigDict, trial_id
from softprompt.results import Row

MODEL = study.SMOLLM2
TARGETS = ("amazon_sentiment", "question_type")
EXAMPLES = 100
STARTS = {"labels": "labels", "movie prompt": "file"}  # name -> method.init

CAPTION = (
    f"{study.SCORE_CAPTION} Prompts of 20 vectors, {EXAMPLES} training examples, others for each "
    "seed; movie prompt: from Figure 1's prompt of the same seed."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full": for each seed the prompt for movie snippets, and the others.

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    return [config for seed in study.SEEDS for config in (source(seed), *targets(seed))]


def source(seed: int) -> ConfigDict:
    """Figure 1's prompt for movie snippets."""
    return study.trial(MODEL, "prompt", seed)


def targets(seed: int) -> list[ConfigDict]:
    """The trials on each other task from each start."""
    usual = {"data__train_examples": EXAMPLES, "data__subset_seed": seed}
    movie = {"method__init": "file", "method__init_file": f"trial:{trial_id(source(seed))}"}
    return [
        study.trial(MODEL, "prompt", seed, task__name=task, **usual, **keys)
        for task in TARGETS
        for keys in ({}, movie)
    ]


def by_start(rows: Sequence[Row], task: str) -> dict[str, list[Row]]:
    """Start -> trials on a task, of those that have some."""
    configs = [config for seed in study.SEEDS for config in targets(seed)]
    found = study.select(study.own(rows, configs), task__name=task)
    by_init = study.by_value(found, "method.init", tuple(STARTS.values()))
    return {name: by_init[init] for name, init in STARTS.items() if init in by_init}


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""

    def both(task: str) -> tuple[list[Row], list[Row]]:
        found = by_start(rows, task)
        return found.get("movie prompt", []), found.get("labels", [])

    similar, control = TARGETS
    return [
        study.compared(
            f"from a movie prompt {similar} gains",
            "SuperGLUE at Base: 63.1, and 73.2 from a prompt of source tasks (Vu et al. 2022)",
            *both(similar),
            at_least(0),
        ),
        study.compared(
            f"from a movie prompt {control} gains at most 3 points", "", *both(control), at_most(3)
        ),
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each task and start."""
    parts = []
    for task in TARGETS:
        part = study.score_table("start", by_start(rows, task))
        part.insert(0, "task", task)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the score on each task, for each start."""
    found = {task: by_start(rows, task) for task in TARGETS}
    series = {
        name: {task: study.point(0, some[name]) for task, some in found.items() if name in some}
        for name in STARTS
    }
    return category_plot(series, {}, ylabel="Score (points)", title="SPoT: 100 examples")
