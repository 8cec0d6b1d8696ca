"""Figure 1: does the gap between full fine-tuning and prompt tuning close with model size?

Question: on models from 0.4M to 135M parameters, by how many points is full fine-tuning ahead of a
prompt of 20 vectors, when both train for equally many steps (400 of 32 examples on the ladder, 50
of 16 on SmolLM2)? And how do zero-shot, few-shot, and training on both tasks at once compare? Rates
were found on d1, and for SmolLM2 in `method_comparison`, on movie snippets.

Prediction, from the paper's Figure 1: the gap shrinks with size, from at least 15 points at the
smallest model to at most 5 at the largest. These are refuted if the slope of the gap over the
logarithm of the size is positive, and by a gap on the other side of 15 and of 5. At the largest
model a prompt is ahead of few-shot prompting, full fine-tuning on both tasks at once (multi-task)
is at least as good as on each, and one prompt for both loses at most 5 points. These are refuted if
the order is reversed, and if it loses more.

Command:
    softprompt sweep paper/figure1 --workdir runs/paper

Cost: 156 trials, 26 on each model ("pilot": d1, d3 and SmolLM2, 78). The ladder's models must be
there (`softprompt pretrain`, or `softprompt ladder import`). The report says what they took.

Found: 2 holds, 1 refuted, 3 undecided. Holds: the gap shrinks with size (points per tenfold
parameters): -16.9 (-20.2 to -13.6); the gap is at least 15 points at the smallest model: 42.9 (34.9
to 51.0). Refuted: full fine-tuning on both tasks at once is at least as good at the largest model:
-3.3 (-5.8 to -0.7). Undecided: the gap is at most 5 points at the largest model: 2.3 (-3.6 to 8.2);
a prompt is ahead of few-shot prompting at the largest model: 41.5 (-20.5 to 103.5); one prompt for
both tasks loses at most 5 points at the largest model: 5.9 (-0.6 to 12.4).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import Estimate, at_least, at_most, slope
from softprompt.analysis.plots import length_plot
from softprompt.config import ConfigDict
from softprompt.errors import unknown
from softprompt.results import Row

MODELS = {
    "pilot": ("ladder/d1", "ladder/d3", study.SMOLLM2),
    "full": (*(f"ladder/d{n}" for n in range(5)), study.SMOLLM2),
}
METHODS = ("prompt", "full")
BOTH = {"data__mixture": ",".join(study.TASKS)}

# Name -> method, and keys of its trials. A mixture's trials are on both tasks. Six examples are as
# many as the ladder's models have room for if inputs, of 100 tokens at most, get no more than 128.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("prompt", {}),
    "full": ("full", {}),
    "prompt, both tasks": ("prompt", BOTH),
    "full, both tasks": ("full", BOTH),
    "few-shot": ("fewshot", {"method__shots": 6, "task__max_input": 128}),
    "zero-shot": ("none", {}),
}
Trials = Mapping[str, Mapping[str, Sequence[Row]]]  # line -> model -> trials

CAPTION = (
    "Score: (accuracy - majority) / (1 - majority) on the test examples, in points, 0 for the most "
    "frequent label, the mean over the tasks that all trials have. Minus a prompt: paired by task, "
    "seed and example, with its 95 % interval over seeds and examples; full fine-tuning's is the "
    "gap. The gaps of different models are taken as independent, although they share the examples."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "pilot" or "full", the cheapest models first.

    Raises:
        UserError: another subset.
    """
    if subset not in MODELS:
        raise unknown("subset", subset, MODELS)
    return [config for model in MODELS[subset] for line in LINES for config in configs(model, line)]


def configs(model: str, line: str) -> list[ConfigDict]:
    """The trials of a line on a model; zero-shot, nothing depends on the seed."""
    method, keys = LINES[line]
    seeds = study.SEEDS[:1] if method == "none" else study.SEEDS
    tasks = study.TASKS[:1] if keys is BOTH else study.TASKS
    return [
        study.trial(model, method, seed, task__name=task, **keys)
        for task in tasks
        for seed in seeds
    ]


def trials(rows: Sequence[Row], line: str) -> dict[str, list[Row]]:
    """Model -> trials of a line on movie snippets alone, by the model's size."""
    models = sorted(MODELS["full"], key=study.size)
    found = study.own(rows, [config for model in models for config in configs(model, line)])
    return study.by_value(found, "model.name", models, task__name=study.TASK)


def by_line(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Line -> model -> trials, by the model's size, on the tasks that all of them have.

    A trial on both tasks is in it once for each.
    """
    names = {(method, keys is BOTH): line for line, (method, keys) in LINES.items()}
    found: dict[tuple[str, str], list[Row]] = {}
    for row in study.own(rows, sweep()):
        mixed = bool(study.value(row, "data.mixture"))
        line, model = names[study.value(row, "method.name"), mixed], study.value(row, "model.name")
        found.setdefault((line, model), []).extend(study.by_task(row))
    found = study.on_common_tasks(found)
    models = sorted({model for _, model in found}, key=study.size)
    return {
        line: {model: found[line, model] for model in models if (line, model) in found}
        for line in LINES
    }


def pairs_by_model(found: Trials, ours: str, theirs: str) -> dict[str, list[tuple[Row, Row]]]:
    """Model -> pairs of two lines, of models that have some, by size."""
    paired = {
        model: study.pairs(some, found[theirs].get(model, []))
        for model, some in found[ours].items()
    }
    return {model: pairs for model, pairs in paired.items() if pairs}


def gaps(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Model -> points by which full fine-tuning is ahead, by size."""
    return differences(by_line(rows), "full", "prompt")


def differences(found: Trials, ours: str, theirs: str) -> dict[str, Estimate]:
    """Model -> points by which one line is ahead of another, by size."""
    paired = pairs_by_model(found, ours, theirs)
    made = {model: study.difference(pairs) for model, pairs in paired.items()}
    return {model: one for model, one in made.items() if one}


def size_slope(gap: Mapping[str, Estimate]) -> Estimate | None:
    """The slope of gaps over log10 of the models' parameters; None for fewer than two models."""
    sizes = [math.log10(study.size(model)) for model in gap]
    return slope(sizes, list(gap.values())) if len(gap) > 1 else None


# Claim, the paper's numbers, model, the two lines that are compared, prediction.
AT_A_SIZE = (
    (
        "the gap is at least 15 points at the smallest model",
        "3.0 points at Small; at most 10.6, at Base",
        ("ladder/d0", "full", "prompt"),
        at_least(15),
    ),
    (
        "the gap is at most 5 points at the largest model",
        "1.1 points at XXL",
        (study.SMOLLM2, "full", "prompt"),
        at_most(5),
    ),
    (
        "a prompt is ahead of few-shot prompting at the largest model",
        "59.8 at Small, 88.8 at XXL; 40.6 and 52.8 for GPT-3 of like size",
        (study.SMOLLM2, "prompt", "few-shot"),
        at_least(0),
    ),
    (
        "full fine-tuning on both tasks at once is at least as good at the largest model",
        "64.6 and 62.8 at Small, 90.1 and 89.9 at XXL",
        (study.SMOLLM2, "full, both tasks", "full"),
        at_least(0),
    ),
    (
        "one prompt for both tasks loses at most 5 points at the largest model",
        "",
        (study.SMOLLM2, "prompt", "prompt, both tasks"),
        at_most(5),
    ),
)


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""
    found = by_line(rows)
    gap = differences(found, "full", "prompt")
    paired = pairs_by_model(found, "full", "prompt").values()
    learnt = study.above_chance(*(group for pairs in paired for group in zip(*pairs, strict=True)))
    shrinks = study.Finding(
        "the gap shrinks with size (points per tenfold parameters)",
        "3.0 points at Small, 10.6 at Base, 6.8 at Large, 3.9 at XL, 1.1 at XXL",
        size_slope(gap) if learnt else None,
        at_most(0),
        min((study.seed_count([one for one, _ in pairs]) for pairs in paired), default=0),
    )
    made = [shrinks]
    for claim, paper, (model, *lines), prediction in AT_A_SIZE:
        ours, theirs = (found[line].get(model, []) for line in lines)
        made.append(study.compared(claim, paper, ours, theirs, prediction))
    return made


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each model and line of the figure."""
    found, lines = by_line(rows), []
    ahead = {line: differences(found, line, "prompt") for line in LINES if line != "prompt"}
    models = sorted({model for some in found.values() for model in some}, key=study.size)
    for model in models:
        scores = study.score_table("trained", {line: found[line].get(model, []) for line in LINES})
        scores.insert(0, "model", model)
        scores.insert(1, "parameters", study.size(model))
        shown = [study.shown(ahead.get(line, {}).get(model)) for line in scores["trained"]]
        lines.append(scores.assign(**{"minus a prompt": shown}))
    return pd.concat(lines, ignore_index=True) if lines else pd.DataFrame()


def figure(rows: Sequence[Row]) -> Figure:
    """Returns scores by the size of the model, a line for each way to use it."""
    series = {
        line: [study.point(study.size(model), some) for model, some in by_model.items()]
        for line, by_model in by_line(rows).items()
    }
    return length_plot(
        series, {}, xlabel="Parameters", ylabel="Score (points)", title="Figure 1: size"
    )
