"""Table 1: does a prompt lose less than full fine-tuning on another domain?

Question: trained on movie snippets and tested on product reviews, tweets and editorials without
further training, how many points does each method lose against its own score on movie snippets?

Prediction, from the paper's Table 1: a prompt loses less on average. It is refuted if full
fine-tuning loses less.

Command:
    softprompt sweep paper/figure1 --workdir runs/paper

Cost: Figure 1's trials on SmolLM2 are tested on 3,000 more examples: about four minutes a trial on
one core.

Found: 1 undecided. Undecided: on other domains full fine-tuning loses more than a prompt (points):
1.1 (-32.5 to 34.7).
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import figure1, study
from softprompt.analysis.comparisons import Estimate, at_least, contrast
from softprompt.analysis.plots import category_plot
from softprompt.results import Row
from softprompt.trials.records import example_scores

MODEL = study.SMOLLM2
TASKS = (study.TASK, *study.SHIFTED)

CAPTION = (
    f"{MODEL}, trained on movie snippets: score on the test split of each set, in points, 0 for "
    "the most frequent label, with its 95 % interval over seeds and test examples."
)


def trials(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Method -> the trials that were tested on the other domains."""
    found = {method: figure1.trials(rows, method).get(MODEL, []) for method in figure1.METHODS}
    return {
        method: [row for row in some if set(TASKS) <= row["answers"].keys()]
        for method, some in found.items()
    }


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of a prompt and full fine-tuning with one seed."""
    found = trials(rows)
    return study.pairs(found["prompt"], found["full"])


def saved(paired: Sequence[tuple[Row, Row]]) -> Estimate | None:
    """The points that full fine-tuning loses more than a prompt, the mean over other domains.

    None without pairs, or if neither is above chance on the task that was trained on.
    """
    if not study.above_chance(*zip(*paired, strict=True)):
        return None
    prompt, full = zip(*paired, strict=True)
    ahead = {task: example_scores(prompt, task) - example_scores(full, task) for task in TASKS}
    share = 1 / len(study.SHIFTED)
    weights = {study.TASK: -1.0} | dict.fromkeys(study.SHIFTED, share)
    return study.in_points(contrast(weights, ahead))


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction, and what was found."""
    paired = pairs(rows)
    return [
        study.Finding(
            "on other domains full fine-tuning loses more than a prompt (points)",
            "by F1, a prompt is 2.0 points ahead on the mean of six domains, 0.1 behind on SQuAD",
            saved(paired),
            at_least(0),
            len(paired),
        )
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each set."""
    found, paired = trials(rows), pairs(rows)
    lines = [
        {
            "tested on": task,
            **{method: study.shown(study.mean(some, task)) for method, some in found.items()},
            "prompt - full": study.shown(study.difference(paired, task)),
        }
        for task in TASKS
    ]
    return pd.DataFrame(lines if any(found.values()) else [])


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the score on each set, for each method."""
    series = {}
    for method, some in trials(rows).items():
        means = {task: study.mean(some, task) for task in TASKS}
        series[method] = {
            task.removesuffix("_sentiment"): study.estimate_point(mean)
            for task, mean in means.items()
            if mean
        }
    return category_plot(series, {}, ylabel="Score (points)", title="Table 1: other domains")
