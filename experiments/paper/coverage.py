"""Which trials each artefact of the study reads, and which of them have run."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import pandas as pd

from experiments.paper import (
    continual,
    everything,
    figure1,
    figure3_length,
    scaling_law,
    section7,
    study,
    style,
    table1,
    table5,
)
from softprompt.config import ConfigDict, task_names
from softprompt.results import Row
from softprompt.trials.outputs import experiment_name


def _of_figure1(models: Sequence[str], lines: Sequence[str]) -> list[ConfigDict]:
    return [one for model in models for line in lines for one in figure1.configs(model, line)]


def _on_movies(configs: Sequence[ConfigDict]) -> list[ConfigDict]:
    return [one for one in configs if everything.on_movies(one)]


# The trials of artefacts without a sweep, which are those of others.
SHARED: dict[ModuleType, Callable[[], list[ConfigDict]]] = {
    scaling_law: lambda: [
        *_of_figure1(scaling_law.LADDER, figure1.METHODS),
        *figure3_length.sweep(),
    ],
    table1: lambda: _on_movies(_of_figure1([table1.MODEL], figure1.METHODS)),
    section7: section7.configs,
    table5: figure3_length.sweep,
    continual: lambda: _on_movies(_of_figure1([continual.MODEL], ["full"])),
}
# What a trial's record must have beside.
MEASURED: dict[ModuleType, Callable[[Row], bool]] = {
    table1: lambda row: set(table1.TASKS) <= row.get("answers", {}).keys(),
    section7: lambda row: "geometry" in row,
    table5: lambda row: bool(table5.by_length([row])),
    style: lambda row: "style" in row,
}


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The trials that an artefact reads.

    Attributes:
        artefact: a module of the study.
        planned: their configs, without those of `continual` on later tasks, whose model is a
            folder.
        count: how many there are in all.
        done: records of those that have run, and were measured as the artefact needs.
    """

    artefact: ModuleType
    planned: Sequence[ConfigDict]
    count: int
    done: Sequence[Row]


def cover(artefact: ModuleType, records: Sequence[Row]) -> Coverage:
    """The trials that an artefact reads, and those of them that have run."""
    planned: list[ConfigDict] = SHARED.get(artefact, getattr(artefact, "sweep", list))()
    measured = MEASURED.get(artefact, lambda row: True)
    done = [row for row in study.own(records, planned, answered=False) if measured(row)]
    if artefact is not continual:
        return Coverage(artefact, planned, len(planned), done)
    return Coverage(artefact, planned, len(planned) + later_count(), [*done, *later_tasks(records)])


def later_count() -> int:
    """The number of `continual`'s trials on tasks after the first."""
    return len(study.SEEDS) * len(continual.LATER)


def later_tasks(records: Sequence[Row]) -> list[Row]:
    """The finished trials of `continual` on tasks after the first, one for each seed and task."""
    found = {}
    for row in study.select(records):
        for task in continual.LATER:
            end = f"{continual.FOLDER}/s{study.value(row, 'seed')}/{task}/start"
            if str(study.value(row, "model.name")).endswith(end):
                found[study.value(row, "seed"), task] = row
    return list(found.values())


def whole_study(records: Sequence[Row]) -> tuple[int, int]:
    """How many trials of the study have run, and how many it has; each counts once."""
    configs = everything.sweep()
    ran = len(study.own(records, configs, answered=False)) + len(later_tasks(records))
    return ran, len(configs) + later_count()


def example_counts(covered: Coverage) -> dict[str, int]:
    """Task -> the test examples of an artefact's trials; of other domains for Table 1 alone."""
    found: dict[str, int] = {}
    skipped = set() if covered.artefact is table1 else set(study.SHIFTED)
    for row in covered.done:
        counts = {task: one["examples"] for task, one in row.get("answers", {}).items()}
        counts |= {task: len(one["nats"]) for task, one in row.get("targets", {}).items()}
        for task in counts.keys() - (skipped - set(task_names(row["config"]))):
            found[task] = max(found.get(task, 0), counts[task])
    return dict(sorted(found.items()))


def not_run(covered: Sequence[Coverage]) -> pd.DataFrame:
    """A line for each artefact that lacks trials: how many, and of which tasks and models."""
    lines = []
    for one in covered:
        if left := one.count - len(one.done):
            done = [row["config"] for row in one.done]
            lines.append(
                {
                    "artefact": experiment_name(one.artefact),
                    "trials": one.count,
                    "not run": left,
                    "tasks": _missing(one.planned, done, lambda c: " + ".join(task_names(c))),
                    "models": _missing(one.planned, done, _model),
                }
            )
    return pd.DataFrame(lines)


def _model(config: Mapping[str, Any]) -> str:
    return str(config["model"]["name"]).removeprefix("ladder/")


def _missing(
    wanted: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
    name: Callable[[Mapping[str, Any]], str],
) -> str:
    """How many trials of each name are wanted and not found, as text."""
    counts = Counter(map(name, wanted)) - Counter(map(name, found))
    return ", ".join(f"{count} {one}" for one, count in counts.items())
