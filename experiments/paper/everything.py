"""The whole study: the trials of every artefact, each run once, and all verdicts in one table.

Question: which of the paper's findings hold on models that a laptop can train?

Prediction: see the artefacts, which are the other files of this folder.

Command:
    softprompt sweep paper/everything --subset laptop --workdir runs/paper
    python -m experiments.paper.continual --workdir runs/paper
    python -m experiments.paper.report --workdir runs/paper

Cost: "laptop" is what two cores do in about 90 minutes, with two seeds for some. `make paper`
runs these three commands. "full" is all trials, the laptop's first; --minutes stops a sweep in
time, and the same command continues. `make paper-full` runs it, `style` and `figure2` too. The
ladder's models must be there (`softprompt ladder`).
"""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import (
    continual,
    data_size,
    domain,
    figure1,
    figure2,
    figure3_length,
    figure3_pretraining,
    figure3_start,
    scaling_law,
    section7,
    spot,
    steps,
    study,
    style,
    table1,
    table2,
    table3,
    table5,
    table6,
)
from softprompt.config import ConfigDict, resolve, trial_id
from softprompt.errors import unknown
from softprompt.results import Row
from softprompt.trials.outputs import experiment_name

# In the order in which their trials run; the artefacts without a sweep read the others' trials.
ARTEFACTS: tuple[ModuleType, ...] = (
    figure1,
    scaling_law,
    table1,
    section7,
    steps,
    figure3_length,
    table5,
    table3,
    figure3_start,
    spot,
    figure2,
    figure3_pretraining,
    table2,
    continual,
    table6,
    data_size,
    domain,
    style,
)
SWEPT = [artefact for artefact in ARTEFACTS if hasattr(artefact, "sweep")]


def on_movies(config: ConfigDict) -> bool:
    """Whether a trial is on movie snippets alone."""
    return bool(config.task.name == study.TASK and not config.data.mixture)


def of_two_seeds(config: ConfigDict) -> bool:
    """Whether a trial has one of two seeds: fewer decide nothing."""
    return config.seed in study.SEEDS[:2]


# The trials of "laptop"; artefacts that are not here are for "full" alone.
LAPTOP: dict[ModuleType, Callable[[ConfigDict], bool]] = {
    figure1: lambda config: on_movies(config) and config.model.name != scaling_law.HELD_OUT,
    figure3_length: lambda config: config.method.length in (1, 20, 100),
    figure3_start: of_two_seeds,
    figure3_pretraining: lambda config: not on_movies(config),
    table3: lambda config: True,
    table6: lambda config: config.model.name != study.SMOLLM2,
    steps: on_movies,
    table2: of_two_seeds,
}

CAPTION = study.VERDICT_CAPTION


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full", those of all artefacts, or of "laptop"; each trial once.

    "full" begins with those of "laptop", so that a part of it is the laptop's study.

    Raises:
        UserError: another subset.
    """
    if subset not in ("full", "laptop"):
        raise unknown("subset", subset, ("full", "laptop"))
    every = [(artefact, config) for artefact in SWEPT for config in artefact.sweep()]
    laptop = [
        config for artefact, config in every if artefact in LAPTOP and LAPTOP[artefact](config)
    ]
    configs = [*laptop, *(config for _, config in every)] if subset == "full" else laptop
    return list({trial_id(resolve(config)): config for config in configs}.values())


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each prediction."""
    return verdict_table({one: one.findings(rows) for one in ARTEFACTS})


def verdict_table(found: Mapping[ModuleType, Sequence[study.Finding]]) -> pd.DataFrame:
    """A line for each finding of the artefacts."""
    tables = {experiment_name(one): study.finding_table(some) for one, some in found.items()}
    return pd.concat(tables, names=["artefact", None]).reset_index(level=0).reset_index(drop=True)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns Figure 1."""
    return figure1.figure(rows)
