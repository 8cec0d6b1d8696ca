"""What the artefacts of the study share: models, tasks, rates, trials, and findings.

The study asks the paper's questions on models that a laptop can train: the ladder of
`softprompt pretrain`, and SmolLM2. A score is the mean over tasks of (accuracy - majority) /
(1 - majority), so that 0 is the most frequent label and 1 is perfect.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from softprompt.analysis.comparisons import (
    Estimate,
    Prediction,
    Scores,
    mean_score,
    paired_difference,
    verdict,
)
from softprompt.analysis.plots import Point
from softprompt.config import ConfigDict, base_config, from_dict, set_key, to_dict, trial_id
from softprompt.models.shapes import parameter_count
from softprompt.pretrained.catalog import CATALOG
from softprompt.pretrained.ladder import RUNGS
from softprompt.results import Row
from softprompt.trials.records import example_scores

SMOLLM2 = "smollm2-135m-instruct-q4"
TASK = "movie_sentiment"
SEEDS = (0, 1, 2)
LENGTH = 20

# Steps, and examples a step. A model of the ladder sees 12,800 snippets, which full fine-tuning
# needs there; SmolLM2 sees 800, since a step of it takes as long as fifty of the smallest rung's.
LADDER_STEPS, SMOLLM2_STEPS = (400, 32), (50, 16)

# Peak learning rates, of prompts in embedding RMS: the best validation accuracy of the three in
# `SEARCHED` for d1 (`rates`). Other rungs take d1's until their own search has run. SmolLM2's are
# those of `method_comparison`'s search.
RATES: dict[tuple[str, str], float] = {
    (SMOLLM2, "prompt"): 0.08,
    (SMOLLM2, "full"): 5e-5,
    ("ladder/d1", "prompt"): 0.5,
    ("ladder/d1", "full"): 1e-3,
}
SEARCHED = {"prompt": (0.1, 0.5, 2.0), "full": (3e-4, 1e-3, 3e-3)}


def trial(model: str, method: str, seed: int = 0, **changes: Any) -> ConfigDict:
    """A trial of the study.

    Args:
        model: a name of the catalogue or the ladder.
        method: such as "prompt" or "full".
        seed: of the trial.
        **changes: other keys, as `section__key=value`.
    """
    config = base_config()
    rate = RATES.get((model, method)) or RATES.get(("ladder/d1", method), 0.01)
    steps, batch = SMOLLM2_STEPS if model == SMOLLM2 else LADDER_STEPS
    keys: dict[str, Any] = {
        "model.name": model,
        "method.name": method,
        "seed": seed,
        "task.name": TASK,
        "data.validation_examples": 200,
        "data.test_examples": 1000,
    }
    if method not in ("none", "fewshot"):
        keys |= {
            "optimizer.rate": rate,
            "optimizer.warmup": steps // 10,
            "train.steps": steps,
            "train.batch": batch,
            "eval.every": steps // 4,
        }
    if method == "prompt":
        keys |= {
            "method.length": LENGTH,
            "method.init": "labels",
            "optimizer.rate_unit": "embedding_rms",
        }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    for key, value in keys.items():
        set_key(config, key, value)
    return config


def size(model: str) -> int:
    """The parameters of a model."""
    config = RUNGS.get(model.partition("@")[0])
    return parameter_count(config or CATALOG[model].config)


def own(records: Sequence[Row], configs: Sequence[ConfigDict]) -> list[Row]:
    """The records that are trials of these configs, in whatever dtype.

    One folder has the trials of all artefacts, and of others.
    """
    wanted = {_identity(json.dumps(to_dict(config))) for config in configs}
    return [row for row in records if _identity(json.dumps(row["config"])) in wanted]


@functools.cache
def _identity(tree: str) -> str:
    """The id in float32 of the trial with this config."""
    config = from_dict(json.loads(tree))
    config.model.dtype = "float32"
    return trial_id(config)


def value(record: Row, key: str) -> Any:
    """The value of a key in a record's config."""
    section, _, name = key.rpartition(".")
    return record["config"][section][name] if section else record["config"][name]


def select(records: Sequence[Row], **wanted: Any) -> list[Row]:
    """The finished trials with these values, as `section__key=value`, in the order of seeds."""
    keys = {name.replace("__", "."): value for name, value in wanted.items()}
    found = [
        row
        for row in records
        if row["status"] == "done" and all(value(row, key) == v for key, v in keys.items())
    ]
    return sorted(found, key=lambda row: value(row, "seed"))


def scores(records: Sequence[Row], **wanted: Any) -> dict[str, Scores]:
    """Task -> scores [seeds, examples] of the trials with these values; {} if there are none."""
    found = select(records, **wanted)
    tasks = dict.fromkeys(value(row, "task.name") for row in found)
    return {
        task: example_scores([row for row in found if value(row, "task.name") == task], task)
        for task in tasks
    }


def difference(ours: Mapping[str, Scores], theirs: Mapping[str, Scores]) -> Estimate | None:
    """Ours minus theirs over the seeds that both have, in points; None if there are none."""
    tasks = [task for task in ours if task in theirs]
    if not tasks:
        return None
    seeds = {task: min(len(ours[task]), len(theirs[task])) for task in tasks}
    one, other = ({task: s[task][: seeds[task]] for task in tasks} for s in (ours, theirs))
    return points(paired_difference(one, other))


def mean(found: Mapping[str, Scores]) -> Estimate | None:
    """The mean score, in points; None if there are no trials."""
    return points(mean_score(found)) if found else None


def accuracy(trials: Sequence[Row]) -> float | None:
    """The mean test accuracy of trials."""
    found = [row["metrics"]["test"]["accuracy"] for row in trials]
    return sum(found) / len(found) if found else None


def shown(found: Estimate | None) -> str:
    """An estimate with its interval, as text."""
    return f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f})" if found else ""


def points(found: Estimate) -> Estimate:
    """The same times 100."""
    return Estimate(100 * found.value, 100 * found.low, 100 * found.high, 100 * found.draws)


def by_value(
    records: Sequence[Row], key: str, values: Sequence[Any], **fixed: Any
) -> dict[Any, dict[str, Scores]]:
    """The `scores` of each value of a key that has trials; `fixed` are values of other keys."""
    name = key.replace(".", "__")
    found = {one: scores(records, **{name: one}, **fixed) for one in values}
    return {one: tasks for one, tasks in found.items() if tasks}


def score_table(column: str, found: Mapping[Any, Mapping[str, Scores]]) -> pd.DataFrame:
    """A line for each value: its seeds and its score with an interval."""
    lines = [
        {column: one, "seeds": min(map(len, tasks.values())), "score": shown(mean(tasks))}
        for one, tasks in found.items()
    ]
    return pd.DataFrame(lines, columns=[column, "seeds", "score"])


def point(x: float, tasks: Mapping[str, Scores]) -> Point:
    """A score with its interval and its seeds, for a figure."""
    score = mean(tasks)
    assert score is not None
    seeds = min(map(len, tasks.values()))
    values = 100 * np.mean([some[:seeds].mean(1) for some in tasks.values()], axis=0)
    return Point(x, score.value, score.low, score.high, tuple(values.tolist()))


@dataclasses.dataclass(frozen=True)
class Finding:
    """A prediction and what was found.

    Attributes:
        claim: the prediction, as a sentence.
        paper: the paper's number or sentence.
        found: our number, with its interval; None if trials are missing.
        prediction: the ranges in which it holds and is refuted.
    """

    claim: str
    paper: str
    found: Estimate | None
    prediction: Prediction

    @property
    def verdict(self) -> str:
        """One of `comparisons.VERDICTS`: "holds", "refuted", "undecided" or "not run"."""
        return verdict(self.found, self.prediction)


def finding_table(found: Sequence[Finding]) -> pd.DataFrame:
    """A line a prediction: what the paper found, what was found here, and the verdict."""
    return pd.DataFrame(
        {
            "prediction": [one.claim for one in found],
            "in the paper": [one.paper for one in found],
            "here (95 %)": [shown(one.found) for one in found],
            "verdict": [one.verdict for one in found],
        }
    )
