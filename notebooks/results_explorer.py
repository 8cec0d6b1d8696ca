# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Results explorer
#
# **Question.** What do the trials of a folder say, and how sure is it?
#
# **Cost.** Seconds. No model is loaded.
#
# **Reads.** A folder of runs, or a file of records: result rows with what each test example scored.
# By default it reads the committed records of the study, `experiments/paper/results/records.jsonl`,
# and of these the trials of its Figure 1.

# %%
# %matplotlib inline
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

# The repository: the first folder from here up that holds the study.
ROOT = next(
    folder
    for folder in (Path.cwd(), *Path.cwd().parents)
    if (folder / "experiments/paper").is_dir()
)
sys.path.insert(0, str(ROOT))

import softprompt as sp
from experiments.paper import figure1, study
from softprompt.analysis.comparisons import mean_score, paired_difference
from softprompt.analysis.plots import COLOURS, STYLE, category_plot
from softprompt.results import Row, read_trials, to_frame
from softprompt.trials.experiment import load_experiment
from softprompt.trials.records import collect, read_records

plt.rcParams.update(STYLE)

# %% tags=["parameters"]
SOURCE = ""  # a folder of runs, such as "runs/paper", or a file of records; "" is the committed one
EXPERIMENT = "paper/figure1"  # whose trials on movie snippets are explored; "" is all there are
OURS, THEIRS = "full", "prompt"  # two methods to compare

# %% [markdown]
# ## Read and filter
#
# A record has the whole config. `to_frame` makes a table of records, with a column for each key.

# %%
source = Path(SOURCE or ROOT / "experiments/paper/results/records.jsonl")
records = collect(source) if source.is_dir() else read_records(source)
folders = {row["trial"]: path for path, row in read_trials(source)} if source.is_dir() else {}
if EXPERIMENT:
    records = study.own(records, load_experiment(EXPERIMENT).sweep("full"))
    records = study.select(records, task__name=study.TASK, data__mixture="")
if not any(row["status"] == "done" for row in records):
    raise ValueError(f"no finished trial of {EXPERIMENT or 'any experiment'} in {source}")
frame = to_frame(records).rename(
    columns=lambda name: name.removeprefix("config.").removesuffix(".name")
)
print(f"{len(records)} trials, {(frame['status'] == 'done').sum()} done")
accuracy = frame.groupby(["model", "method"])["metrics.test.accuracy"]
accuracy.agg(["count", "mean", "min", "max"]).round(3)

# %% [markdown]
# Any expression over columns selects trials. These are the finished ones of one method:

# %%
columns = ["model", "method", "seed", "metrics.validation.accuracy", "metrics.test.accuracy"]
some = frame.query("method == @THEIRS and status == 'done'")
some[columns].sort_values(["model", "seed"]).reset_index(drop=True)

# %% [markdown]
# Below, trials of a model, a method and a task may differ in their seed only. If they differ in
# more, the next cell says in what; name an `EXPERIMENT` then, or drop some of `records`.

# %%
alike = frame[frame["status"] == "done"].groupby(["model", "method", "task", "seed"])
for name, group in alike:
    if len(group) > 1:
        keys = [key for key in group.columns if key.split(".")[0] in records[0]["config"]]
        values = {key: sorted(group[key].astype(str).unique()) for key in keys}
        differ = {key: found for key, found in values.items() if len(found) > 1}
        raise ValueError(f"{len(group)} trials of {name} differ in {differ}")

# %% [markdown]
# ## Intervals
#
# A score is (accuracy - majority) / (1 - majority) in points: 0 for always answering the most
# frequent label, 100 for perfect. Two things are random: the test examples, which are the same for
# all seeds, and the seeds. The interval contains both. With one seed it contains the examples only,
# so it is too narrow for a claim about the method.

# %%
answered = [row for row in records if row.get("answers")]
models = sorted({study.value(row, "model.name") for row in answered})


def trials(model: str, method: str) -> list[Row]:
    """The finished trials of a model and a method that have answers, in the order of seeds."""
    return study.select(answered, model__name=model, method__name=method)


lines = []
for model in models:
    for method in (OURS, THEIRS):
        if found := trials(model, method):
            one_seed = study.in_points(mean_score(study.scores(found[:1])))
            line = {"model": model, "method": method, "seeds": study.seed_count(found)}
            line |= {"first seed": study.shown(one_seed), "score": study.shown(study.mean(found))}
            lines.append(line)
pd.DataFrame(lines)

# %%
series = {
    method: {model: study.point(0, found) for model in models if (found := trials(model, method))}
    for method in (THEIRS, OURS)
}
category_plot(series, {}, ylabel="Score (points)")

# %% [markdown]
# ## Two methods, paired
#
# Trials of the same model, task and seed are paired, and their scores are subtracted example by
# example. What is hard for both methods then cancels. The last column is the interval's width if
# the two methods had been tested on different examples: pairing gains where they err on the same
# ones. Where seeds differ much, they decide the width, and pairing examples gains nothing.


# %%
def unpaired(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """The width of the difference's interval if the two were independent, in points."""
    widths = [found.high - found.low for some in (ours, theirs) if (found := study.mean(some))]
    return f"{np.linalg.norm(widths):.1f}"


lines = []
for model in models:
    if paired := study.pairs(trials(model, OURS), trials(model, THEIRS)):
        ours, theirs = zip(*paired, strict=True)
        gap = study.in_points(paired_difference(study.scores(ours), study.scores(theirs)))
        line = {"model": model, "pairs": len(paired), f"{OURS} minus {THEIRS}": study.shown(gap)}
        line |= {"width": f"{gap.high - gap.low:.1f}", "width, unpaired": unpaired(ours, theirs)}
        lines.append(line)
if not lines:
    print(f"No trial of {OURS} has the model, task and seed of one of {THEIRS}.")
pd.DataFrame(lines)

# %% [markdown]
# ## Learning curves
#
# Validation accuracy over the steps: a thin line a seed, a thick one their mean. A record carries
# its curve; the trials of a folder have theirs in their logs.


# %%
def curve(record: Row) -> list[tuple[int, float]]:
    """The steps and validation scores of a trial; [] if they were not kept."""
    if record.get("curve"):
        return [(step, value) for step, _, value in record["curve"]]
    if record["trial"] not in folders:
        return []
    name = f"validation/{record['config']['eval']['metric']}"
    log = sp.load_trial(folders[record["trial"]]).log().reindex(columns=["step", name]).dropna()
    return list(zip(log["step"].astype(int), log[name], strict=True))


curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
for row in records:
    if row["status"] == "done" and (points := curve(row)):
        model, method = study.value(row, "model.name"), study.value(row, "method.name")
        curves.setdefault(model, {}).setdefault(method, []).append(points)
if not curves:
    print("No curves are drawn: these records carry none, and their trials' folders are not here.")

# %%
if curves:
    size = (3.2 * len(curves), 3.0)
    figure, panels = plt.subplots(1, len(curves), figsize=size, sharey=True, squeeze=False)
    methods = list(
        dict.fromkeys([THEIRS, OURS, *(name for one in curves.values() for name in one)])
    )
    for axes, (model, by_method) in zip(panels[0], sorted(curves.items()), strict=True):
        for method, seeds in by_method.items():
            colour = COLOURS[methods.index(method) % len(COLOURS)]
            for points in seeds:
                axes.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=1)
            mean = (
                pd.DataFrame([point for points in seeds for point in points]).groupby(0)[1].mean()
            )
            axes.plot(mean.index, mean, color=colour, linewidth=2, label=method)
        axes.set_title(model, loc="left", fontsize=10)
        axes.set_xlabel("Step")
    panels[0, 0].set_ylabel("Validation accuracy")
    panels[0, -1].legend(frameon=False)
    plt.show()

# %% [markdown]
# ## The paper's Figure 1
#
# The same records, as the study reads them: scores by model size, and each prediction with its
# verdict. The verdict is *undecided* unless the whole interval lies in the range of the prediction.

# %%
figure1.figure(records)

# %%
study.finding_table(figure1.findings(records))

# %% [markdown]
# ## Next
#
# * Your own trials: set `SOURCE` to the folder of a sweep, `EXPERIMENT` to its name or to "", and
#   `OURS` and `THEIRS` to two of its methods.
# * `python -m experiments.paper.report` writes all figures and verdicts of the study.
# * `softprompt.trials.records.write_records(file, records)` keeps a folder's results without its
#   arrays.
