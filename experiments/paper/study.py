"""What the artefacts of the study share: models, tasks, rates, trials, and findings.

The study asks the paper's questions on models that a laptop can train: the ladder, and SmolLM2. A
score is the mean over tasks of (accuracy - majority) / (1 - majority).
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
from softprompt.config import (
    ConfigDict,
    base_config,
    from_dict,
    set_key,
    task_names,
    to_dict,
    trial_id,
)
from softprompt.errors import unknown
from softprompt.models.shapes import parameter_count
from softprompt.pretrained.catalog import CATALOG
from softprompt.pretrained.ladder import RUNGS
from softprompt.results import Row
from softprompt.trials.records import example_scores
from softprompt.trials.starts import start_id

SMOLLM2 = "smollm2-135m-instruct-q4"
TASK = "movie_sentiment"
# Whose mean is the score on the ladder, and of Figure 1.
TASKS = (TASK, "question_type")
# Other domains, on which Figure 1's trials on SmolLM2 are also tested, for Table 1.
SHIFTED = ("amazon_sentiment", "tweets_sentiment", "nyt_sentiment")
SEEDS = (0, 1, 2)
LENGTH = 20

# Steps, and examples a step. A model of the ladder sees 12,800 snippets, which full fine-tuning
# needs there; SmolLM2 sees 800, since its steps are long.
LADDER_STEPS, SMOLLM2_STEPS = (400, 32), (50, 16)

# Peak learning rates, of prompts in embedding RMS: the best validation accuracy of the three in
# `SEARCHED` for d1 (`rates`, in bfloat16). Other rungs take d1's until their own search has run.
# SmolLM2's are those of `method_comparison`'s search.
RATES: dict[tuple[str, str], float] = {
    (SMOLLM2, "prompt"): 0.08,
    (SMOLLM2, "full"): 5e-5,
    ("ladder/d1", "prompt"): 0.5,
    ("ladder/d1", "full"): 1e-3,
}
SEARCHED = {"prompt": (0.1, 0.5, 2.0), "full": (3e-4, 1e-3, 3e-3)}


SCORE_CAPTION = (
    "Score in points, 0 for the most frequent label, the mean over its tasks, with its 95 % "
    "interval over seeds and test examples."
)
VERDICT_CAPTION = (
    "A prediction holds, or is refuted, if the whole 95 % interval lies in the range that says so; "
    "otherwise, with one seed, and where no score that is compared is above chance (but for "
    "`steps` and Table 2's threshold: that little is gained), it is undecided. Two that are equal "
    'are undecided too: "at least as good" holds only if the interval has nothing below zero.'
)


def trial(model: str, method: str, seed: int = 0, **changes: Any) -> ConfigDict:
    """A trial of the study.

    Args:
        model: a name of the catalogue or the ladder.
        method: such as "prompt" or "full".
        seed: of the trial.
        **changes: other keys, as `section__key=value`. A trial on SmolLM2 without any is one of
            Figure 1's, and tested on `SHIFTED` too.
    """
    config = base_config()
    rate = RATES.get((model, method)) or RATES.get(("ladder/d1", method), 0.01)
    steps, batch = SMOLLM2_STEPS if model == SMOLLM2 else LADDER_STEPS
    keys: dict[str, Any] = {
        "model.name": model,
        # At the ladder's widths float32 is the quicker dtype, also where bfloat16 products are.
        "model.dtype": "auto" if model == SMOLLM2 else "float32",
        "method.name": method,
        "seed": seed,
        "task.name": TASK,
        "data.validation_examples": 200,
        "data.test_examples": 1000,
    }
    if model == SMOLLM2:
        keys["compute.population"] = 1  # alone, so that Table 5 compares times
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
    changed = keys | {name.replace("__", "."): value for name, value in changes.items()}
    if model == SMOLLM2 and method in ("prompt", "full") and seed in SEEDS and changed == keys:
        changed["eval.transfer"] = ",".join(SHIFTED)
    for key, value in changed.items():
        set_key(config, key, value)
    return config


def check_full(subset: str) -> None:
    """Checks the subset of a sweep that has no parts.

    Raises:
        UserError: it is not "full".
    """
    if subset != "full":
        raise unknown("subset", subset, ("full",))


def size(model: str) -> int:
    """The parameters of a model."""
    config = RUNGS.get(model.partition("@")[0])
    return parameter_count(config or CATALOG[model].config)


def own(
    records: Sequence[Row], configs: Sequence[ConfigDict], *, answered: bool = True
) -> list[Row]:
    """The finished trials of these configs among records, in whatever dtype.

    One folder has the trials of all artefacts, and of others. Of two that differ in the dtype or in
    what else they were tested on, the one that was tested on more counts. With `answered`, trials
    without an answer to each test example do not count.
    """
    wanted, found = {_identity(json.dumps(to_dict(config))) for config in configs}, {}
    for row in sorted(records, key=lambda row: (len(row.get("answers", {})), row["trial"])):
        missing = answered and value(row, "task.name") not in row.get("answers", {})
        if row["status"] == "done" and not missing:
            found[_identity(json.dumps(row["config"]))] = row
    return [row for identity, row in found.items() if identity in wanted]


@functools.cache
def _identity(tree: str) -> str:
    """The id in float32 of the trial with this config, without tests on other tasks.

    Nor does it have the id of the trial that it starts from, which depends on the dtype too.
    """
    config = from_dict(json.loads(tree))
    config.model.dtype, config.eval.transfer = "float32", ""
    if start_id(config):
        config.method.init_file = "trial"
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


def by_value(
    records: Sequence[Row], key: str, values: Sequence[Any], **fixed: Any
) -> dict[Any, list[Row]]:
    """The finished trials of each value of a key that has some; `fixed` are other keys' values."""
    name = key.replace(".", "__")
    found = {one: select(records, **{name: one}, **fixed) for one in values}
    return {one: trials for one, trials in found.items() if trials}


def by_task(record: Row) -> list[Row]:
    """A record for each task that was answered, as if a mixture's trial were on that task alone."""
    config, found = record["config"], []
    for name in task_names(config):
        if name in record.get("answers", {}):
            parts = {"task": config["task"] | {"name": name}, "data": config["data"]}
            parts["data"] = parts["data"] | {"mixture": ""}
            found.append(record | {"config": config | parts})
    return found


def on_common_tasks(groups: Mapping[Any, Sequence[Row]]) -> dict[Any, list[Row]]:
    """The trials of each group on the tasks that all groups have, so that scores compare."""
    tasks = [{value(row, "task.name") for row in rows} for rows in groups.values()]
    common = set.intersection(*tasks) if tasks else set()
    found = {
        key: [row for row in rows if value(row, "task.name") in common]
        for key, rows in groups.items()
    }
    return {key: rows for key, rows in found.items() if rows}


def scores(trials: Sequence[Row], task: str = "") -> dict[str, Scores]:
    """Task -> scores [seeds, examples] of trials, on their own tasks, or all on another one."""
    tasks: dict[str, list[Row]] = {}
    for row in trials:
        tasks.setdefault(task or value(row, "task.name"), []).append(row)
    return {name: example_scores(tasks[name], name) for name in sorted(tasks)}


def keyed(trials: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """Trials by their task and seed."""
    return {(value(row, "task.name"), value(row, "seed")): row for row in trials}


def pairs(ours: Sequence[Row], theirs: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The trials of both that have the same task and seed.

    Zero-shot has one trial a task, since nothing of it depends on the seed: it is paired with every
    seed of the other side.
    """
    one, other = keyed(ours), keyed(theirs)
    one, other = _for_seeds_of(other, one), _for_seeds_of(one, other)
    return [(one[key], other[key]) for key in sorted(one.keys() & other.keys())]


def _for_seeds_of(
    wanted: Mapping[tuple[str, int], Row], found: Mapping[tuple[str, int], Row]
) -> dict[tuple[str, int], Row]:
    """The found trials, of which those that are zero-shot stand for every wanted seed."""
    zero_shot = {key[0]: row for key, row in found.items() if value(row, "method.name") == "none"}
    return dict(found) | {key: zero_shot[key[0]] for key in wanted if key[0] in zero_shot}


def above_chance(*groups: Sequence[Row], task: str = "") -> bool:
    """Whether the score of any group is above the most frequent label's, beyond chance."""
    return any((found := mean(trials, task)) is not None and found.low > 0 for trials in groups)


def difference(paired: Sequence[tuple[Row, Row]], task: str = "") -> Estimate | None:
    """The first minus the second of pairs, in points, on their tasks or another; None for none."""
    if not paired:
        return None
    ours, theirs = (scores(trials, task) for trials in zip(*paired, strict=True))
    return in_points(paired_difference(ours, theirs))


def mean(trials: Sequence[Row], task: str = "") -> Estimate | None:
    """The mean score, in points, on their tasks or another; None if there are no trials."""
    return in_points(mean_score(scores(trials, task))) if trials else None


def shown(found: Estimate | None) -> str:
    """An estimate with its interval, if it has one, as text."""
    if not found:
        return ""
    value, low, high = (f"{one:.1f}" for one in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})" if found.low < found.high else value


def in_points(found: Estimate) -> Estimate:
    """The same times 100."""
    return Estimate(100 * found.value, 100 * found.low, 100 * found.high, 100 * found.draws)


def score_table(column: str, found: Mapping[Any, Sequence[Row]]) -> pd.DataFrame:
    """A line for each value that has trials: its tasks, seeds, and score with an interval."""
    lines = [
        {
            column: one,
            "tasks": ", ".join(scores(trials)),
            "seeds": seed_count(trials),
            "score": shown(mean(trials)),
        }
        for one, trials in found.items()
        if trials
    ]
    return pd.DataFrame(lines, columns=[column, "tasks", "seeds", "score"])


def seed_count(trials: Sequence[Row]) -> int:
    """The number of different seeds, on the task that has the fewest."""
    seeds: dict[str, set[int]] = {}
    for row in trials:
        seeds.setdefault(value(row, "task.name"), set()).add(value(row, "seed"))
    return min(map(len, seeds.values()), default=0)


def estimate_point(found: Estimate) -> Point:
    """An estimate for a figure of categories."""
    return Point(0, found.value, found.low, found.high, ())


def point(x: float, trials: Sequence[Row], task: str = "") -> Point:
    """The score of at least one trial, with its interval and that of each seed, for a figure."""
    score = mean(trials, task)
    assert score is not None
    by_seed = by_value(trials, "seed", sorted({value(row, "seed") for row in trials}))
    each = [np.mean([s.mean() for s in scores(some, task).values()]) for some in by_seed.values()]
    return Point(x, score.value, score.low, score.high, tuple(100 * float(one) for one in each))


@dataclasses.dataclass(frozen=True)
class Finding:
    """A prediction and what was found.

    Attributes:
        claim: the prediction, as a sentence.
        paper: the paper's number or sentence.
        found: our number, with its interval; None if trials are missing, or it is not defined.
        prediction: the ranges in which it holds and is refuted.
        seeds: the fewest seeds of any number in it; 0 if trials are missing.
        examples: test examples of its tasks, where it compares scores; else 0.
    """

    claim: str
    paper: str
    found: Estimate | None
    prediction: Prediction
    seeds: int
    examples: int = 0

    @property
    def verdict(self) -> str:
        """One of `comparisons.VERDICTS`.

        One seed decides nothing: its interval is that of the test examples alone. Nor do trials
        whose number is not defined, such as a half of a lead that there is not.
        """
        if self.found is None or self.seeds < 2:
            return "undecided" if self.seeds else "not run"
        return verdict(self.found, self.prediction)


def compared(
    claim: str,
    paper: str,
    ours: Sequence[Row],
    theirs: Sequence[Row],
    prediction: Prediction,
    *,
    task: str = "",
    at_chance: bool = False,
) -> Finding:
    """A finding about our trials minus theirs; without a number where neither is above chance.

    There a difference only says which label each of them gives; but see `at_chance`.
    """
    paired = pairs(ours, theirs)
    first = [one for one, _ in paired]
    learnt = at_chance or above_chance(*zip(*paired, strict=True), task=task)
    found = difference(paired, task) if learnt else None
    examples = sum(one.shape[1] for one in scores(first, task).values())
    return Finding(claim, paper, found, prediction, seed_count(first), examples)


def finding_table(found: Sequence[Finding]) -> pd.DataFrame:
    """A line a prediction: the verdict, what the paper found, and what was found here."""
    return pd.DataFrame(
        {
            "verdict": [one.verdict for one in found],
            "prediction": [one.claim for one in found],
            "in the paper": [one.paper for one in found],
            "here (95 %)": [shown(one.found) for one in found],
            "seeds": pd.Series([one.seeds if one.found else None for one in found], dtype=object),
            "test examples": pd.Series([one.examples or None for one in found], dtype=object),
        }
    )
