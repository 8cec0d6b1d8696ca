"""Figure 2: does one batch of three tasks give what three runs give?

Question: the paper's Figure 2 serves many tasks with one frozen model, where each row of a batch
has the prompt of its task. Are the scores and predictions in one mixed batch those of each alone?

Prediction: in float32 no candidate's log-probability differs by more than 1e-5 (ten millionths),
and no prediction does. It is refuted by a larger difference, and by any prediction that differs.
Beside it stands by how much the same texts alone differ when other rows hold them, which is
rounding.

Command:
    softprompt sweep paper/spot --workdir runs/paper
    python -m experiments.paper.figure2 --workdir runs/paper

Cost: no trials of its own: three prompts for SmolLM2 are Figure 1's and SPoT's, of seed 0. The
second command scores 60 test texts of each task three times, in four minutes beside other work.

Found: 1 holds, 1 refuted. No prediction of the 180 is another one: 0.0. The scores are 87.7
millionths of a nat apart at most, where 10 were allowed. Alone and packed otherwise the same texts
differ by up to 53 millionths: rounding in float32 is of that size, and 1e-5 was too strict for
sums of log-probabilities.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd
from etils import epath
from matplotlib.figure import Figure

from experiments.paper import spot, study
from experiments.paper.command_line import run_command
from softprompt.analysis.comparisons import Estimate, Prediction, at_most
from softprompt.analysis.plots import Point, category_plot
from softprompt.config import ConfigDict, resolve
from softprompt.console import Progress
from softprompt.data.encode import Encoded, mix
from softprompt.data.eval_batches import eval_batches, eval_shape
from softprompt.data.rows import EvalBatch
from softprompt.errors import UserError
from softprompt.evaluation.ranking import normalise, score_batches, scoring_budget
from softprompt.files import read_json, write_text
from softprompt.results import Row, read_trials
from softprompt.trials.evaluate import trained_delta
from softprompt.trials.prepare import Prepared, prepare_scoring
from softprompt.trials.session import Session

MODEL = study.SMOLLM2
SEED, COUNT = 0, 60  # of the trials; test texts of each task
FILE = "mixed.json"  # in the folder of the trial on the first task
MILLION = 1e6
ONE_BATCH = 1 << 30  # tokens, more than there are

CAPTION = (
    f"{MODEL} in float32: {COUNT} test texts of each task, scored with the task's prompt alone, "
    "and in one batch with those of the other tasks, whose rows have texts of several tasks. "
    "Difference: the largest of a candidate's log-probability, in millionths; packed otherwise: "
    "that between two ways to pack the texts of one task alone. Single numbers, no intervals."
)


def trained() -> dict[str, ConfigDict]:
    """Task -> the trial whose prompt is used: each starts from labels."""
    targets = [config for config in spot.targets(SEED) if config.method.init == "labels"]
    return {config.task.name: config for config in (spot.source(SEED), *targets)}


def find(workdir: epath.PathLike) -> dict[str, epath.Path]:
    """Task -> the folder of its trial.

    Raises:
        UserError: one is not done.
    """
    places = {row["trial"]: (place, row) for place, row in read_trials(workdir)}
    rows, found = [row for _, row in places.values()], {}
    for task, config in trained().items():
        for row in study.own(rows, [config], answered=False):
            found[task] = places[row["trial"]][0]
        if task not in found:
            raise UserError(f"{workdir} has no finished trial of paper/spot on {task}; sweep it")
    return found


def scoring(method: str, task: str, **keys: Any) -> ConfigDict:
    """A config that scores the test texts of a task, or of a mixture, in float32."""
    few = {"data__validation_examples": COUNT, "data__test_examples": COUNT}
    return resolve(
        study.trial(
            MODEL,
            method,
            SEED,
            task__name=task,
            model__dtype="float32",
            data__train_examples=COUNT,
            **few,
            **keys,
        )
    )


def scores(
    prepared: Prepared, delta: Any, test: Encoded, budget: int = ONE_BATCH
) -> tuple[np.ndarray, list[EvalBatch]]:
    """The score of each candidate of each text [texts, candidates], and the batches."""
    shape = eval_shape(test, budget=budget, layout=prepared.layout)
    batches = eval_batches(test, shape, layout=prepared.layout)
    model, weights, shared = prepared.step.model, prepared.frozen, prepared.shared(delta)
    found = score_batches(model, weights, shared, batches, mesh=prepared.mesh)
    return normalise(*found, prepared.config.eval.score), batches


def joined(prompts: Sequence[jax.Array]) -> dict[str, np.ndarray]:
    """Prompts as the delta of `multitask`: the factor of a task is its prompt, times ones."""
    prompts_NPD = np.stack([np.asarray(one, np.float32) for one in prompts])
    count, length, _ = prompts_NPD.shape
    return {
        "prompt": np.ones_like(prompts_NPD[0]),
        "task_cols": np.repeat(np.eye(length, dtype=np.float32)[None], count, axis=0),
        "task_rows": prompts_NPD,
    }


def compare(folders: Mapping[str, epath.Path], session: Session) -> dict[str, Any]:
    """Scores the texts of each task alone and in one batch; what the record of the first keeps."""
    prompts, alone = [], {}
    for task, folder in folders.items():
        prepared = prepare_scoring(scoring("prompt", task), session)
        delta, test = trained_delta(folder, prepared), prepared.tasks[0].test
        usual, other = (scores(prepared, delta, test, n)[0] for n in (ONE_BATCH, scoring_budget()))
        prompts.append(delta["prompt"])
        alone[task] = test, usual, apart(usual, other)
    several = {"data__mixture": ",".join(folders), "method__rank": study.LENGTH}
    start = {"method__length": study.LENGTH, "optimizer__rate": 0.1}
    prepared = prepare_scoring(scoring("multitask", study.TASK, **several, **start), session)
    test = mix({one.task.name: one.test for one in prepared.tasks})
    scores_NC, (batch,) = scores(prepared, joined(prompts), test)
    columns = {tuple(ids): number for number, ids in enumerate(test.candidates)}
    found = {}
    for number, (task, (own, alone_NC, rounding)) in enumerate(alone.items()):
        chosen = [columns[tuple(ids)] for ids in own.candidates]
        mixed_NC = scores_NC[test.tasks == number][:, chosen]
        found[task] = {
            "examples": len(own.ids),
            "difference": apart(mixed_NC, alone_NC),
            "packed otherwise": rounding,
            "changed": int((mixed_NC.argmax(1) != alone_NC.argmax(1)).sum()),
        }
    return {"tasks": found, "rows": len(batch.rows.tokens), "mixed rows": mixed_rows(batch)}


def apart(one_NC: np.ndarray, other_NC: np.ndarray) -> float:
    """The largest difference of scores."""
    return float(np.abs(one_NC - other_NC).max())


def mixed_rows(batch: EvalBatch) -> int:
    """The number of rows that have texts of several tasks."""
    which_RT = np.where(batch.rows.segments > 0, batch.rows.which, -1)
    return sum(len(set(row[row >= 0].tolist())) > 1 for row in which_RT)


def run(workdir: epath.PathLike) -> None:
    """Writes the comparison into the folder of the trial on movie snippets."""
    folders = find(workdir)
    with Progress() as progress:
        found = compare(folders, Session(progress))
    write_text(folders[study.TASK] / FILE, json.dumps(found, indent=1) + "\n")


def measure(folder: epath.PathLike) -> dict[str, Any]:
    """What a trial's record keeps of its comparison; {} for none."""
    file = epath.Path(folder) / FILE
    return {"mixed": read_json(file)} if file.exists() else {}


def compared(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Task -> its comparison; {} for none."""
    own = study.own(rows, [spot.source(SEED)])
    found: dict[str, Any] = next((row["mixed"]["tasks"] for row in own if "mixed" in row), {})
    return {task: found[task] for task in trained() if task in found}


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found. Nothing is drawn at random: tasks count as seeds."""
    found = compared(rows)
    most = {
        name: float(max((one[name] for one in found.values()), default=0))
        for name in ("difference", "changed")
    }
    text = "a single model serves many tasks, each example with the prompt of its task"
    one_text = Prediction((0, 0), (1, np.inf))
    return [
        study.Finding(claim, text, exact(value) if found else None, prediction, len(found))
        for claim, value, prediction in (
            (
                "scores in a batch of three tasks are each task's alone (millionths of a nat off)",
                MILLION * most["difference"],
                at_most(10),
            ),
            ("no prediction changes in that batch (those that do)", most["changed"], one_text),
        )
    ]


def exact(value: float) -> Estimate:
    """A number without an interval."""
    return Estimate(value, value, value, np.array([value]))


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each task."""
    return pd.DataFrame(
        [
            {
                "task": task,
                "texts": one["examples"],
                "largest difference (millionths)": round(MILLION * one["difference"], 2),
                "packed otherwise": round(MILLION * one["packed otherwise"], 2),
                "predictions that differ": one["changed"],
            }
            for task, one in compared(rows).items()
        ]
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the largest difference of each task."""
    series: dict[str, dict[str, Point]] = {}
    for name, key in {"one batch": "difference", "packed otherwise": "packed otherwise"}.items():
        values = {task: MILLION * one[key] for task, one in compared(rows).items()}
        series[name] = {task: Point(0, value, value, value, ()) for task, value in values.items()}
    ylabel = "Largest difference (millionths)"
    plot = category_plot(series, {}, ylabel=ylabel, title="Figure 2: one batch of three tasks")
    plot.axes[0].set_ylim(bottom=0)
    return plot


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores three tasks alone and in one batch."""
    return run_command("figure2", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
