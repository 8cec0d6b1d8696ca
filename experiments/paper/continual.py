"""Tasks in turn: how much of the first task does full fine-tuning forget?

Question: a model of the ladder is fine-tuned on movie snippets, then on headlines, then on
questions. How many points does it lose on movie snippets?

Prediction: at least 10. It is refuted if it loses less. With a prompt for each task nothing can be
lost: the weights are frozen, and a test holds the first prompt's predictions equal to the bit.

Command:
    python -m experiments.paper.continual --workdir runs/paper

Cost: 6 trials on d1, and three of Figure 1's. Each starts from the merged weights of the
one before.

Found: 1 holds. Holds: full fine-tuning on two more tasks loses at least 10 points on the first:
48.3 (40.2 to 56.5).
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from etils import epath
from matplotlib.figure import Figure

import softprompt as sp
from experiments.paper import figure1, study
from experiments.paper.command_line import run_command
from softprompt.analysis.comparisons import at_least
from softprompt.analysis.plots import category_plot
from softprompt.config import ConfigDict, resolve
from softprompt.results import Row
from softprompt.trials.convert import export_merged
from softprompt.trials.run import DELTA
from softprompt.trials.sweep import trial_folder

MODEL = "ladder/d1"
LATER = ("sarcasm", "question_type")
FOLDER = "continual"

CAPTION = (
    f"{MODEL}: score on movie snippets in points, 0 for the most frequent label, after full "
    "fine-tuning on them, and after two more tasks, with its 95 % interval over seeds and examples."
)


def run(workdir: epath.PathLike, seed: int) -> None:
    """Trains on the tasks in turn; what is done already is not done again.

    A folder below the working directory is named relative to it, since the path of the weights is a
    part of a trial's id.
    """
    config = resolve(study.trial(MODEL, "full", seed))
    trial = sp.train(config, trial_folder(workdir, config))
    for task in LATER:
        place = Path(os.path.relpath(workdir)) / FOLDER / f"s{seed}" / task
        if not (place / "start").exists():
            export_merged(trial.config, trial.folder / DELTA, epath.Path(place / "start"))
        trial = sp.train(later(str(place / "start"), seed, task), place / "trial")


def later(model: str, seed: int, task: str) -> ConfigDict:
    """The trial on a later task; the last one is tested on the first task too."""
    other = study.TASK if task == LATER[-1] else ""
    return study.trial(model, "full", seed, task__name=task, eval__transfer=other)


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """For each seed the trial on the first task, and that on the last."""
    ends = {f"{FOLDER}/s{seed}/{LATER[-1]}/start": seed for seed in study.SEEDS}
    models = {str(study.value(row, "model.name")) for row in rows}
    configs = [
        later(model, seed, LATER[-1])
        for model in sorted(models)
        for end, seed in ends.items()
        if model.endswith(end)
    ]
    last = {study.value(row, "seed"): row for row in study.own(rows, configs)}
    last = {seed: row for seed, row in last.items() if study.TASK in row["answers"]}
    first = {study.value(row, "seed"): row for row in figure1.trials(rows, "full").get(MODEL, [])}
    return [(first[seed], last[seed]) for seed in sorted(first.keys() & last.keys())]


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction, and what was found."""
    found = pairs(rows)
    learnt = study.above_chance(*zip(*found, strict=True), task=study.TASK)
    return [
        study.Finding(
            "full fine-tuning on two more tasks loses at least 10 points on the first",
            "",
            study.difference(found, study.TASK) if learnt else None,
            at_least(10),
            len(found),
        )
    ]


def stages(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What was learnt -> trials; {} without any."""
    found = pairs(rows)
    names = ("movie snippets", f"then {' and '.join(LATER)}")
    return {name: [pair[n] for pair in found] for n, name in enumerate(names) if found}


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each state."""
    return pd.DataFrame(
        [
            {
                "learnt": name,
                "seeds": study.seed_count(trials),
                "score on movie snippets": study.shown(study.mean(trials, study.TASK)),
            }
            for name, trials in stages(rows).items()
        ]
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the score on the first task, before and after."""
    points = {name: study.point(0, trials, study.TASK) for name, trials in stages(rows).items()}
    return category_plot({MODEL: points}, {}, ylabel="Score (points)", title="Tasks in turn")


def run_all(workdir: str) -> None:
    """Trains on the tasks in turn, for each seed."""
    for seed in study.SEEDS:
        run(workdir, seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains on the tasks in turn, for each seed."""
    return run_command("continual", run_all, arguments)


if __name__ == "__main__":
    sys.exit(main())
