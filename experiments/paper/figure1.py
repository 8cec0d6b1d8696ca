"""Figure 1: does the gap between full fine-tuning and prompt tuning close with model size?

Question: on models from 0.4M to 135M parameters, by how many points is full fine-tuning ahead of a
prompt of 20 vectors, when both train for equally many steps (400 of 32 examples on the ladder, 50
of 16 on SmolLM2)? Rates were found on d1, and for SmolLM2 in `method_comparison`.

Prediction, from the paper's Figure 1: the gap shrinks with size, from at least 15 points at the
smallest model to at most 5 at the largest. It is refuted if the slope of the gap over the logarithm
of the size is not negative.

Command:
    softprompt sweep paper/figure1 --workdir runs/paper

Cost: 30 trials ("pilot": d1, d3 and SmolLM2, 18). The ladder's models must be there (`softprompt
pretrain`, or `softprompt ladder import`). The report says what they took.
"""

import math
from collections.abc import Sequence

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
    "full": ("ladder/d0", "ladder/d1", "ladder/d2", "ladder/d3", study.SMOLLM2),
}
METHODS = ("prompt", "full")

CAPTION = (
    "Score: (accuracy - majority) / (1 - majority) on the test examples, in points, 0 for the most "
    "frequent label. Gap: full fine-tuning minus prompt, paired by seed and example, with its 95 % "
    "interval over seeds and examples. The gaps of different models are taken as independent, "
    "although they share the examples."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "pilot" or "full", the cheapest models first.

    Raises:
        UserError: another subset.
    """
    if subset not in MODELS:
        raise unknown("subset", subset, MODELS)
    return [
        study.trial(model, method, seed)
        for model in MODELS[subset]
        for seed in study.SEEDS
        for method in METHODS
    ]


def trials(rows: Sequence[Row], method: str) -> dict[str, list[Row]]:
    """Model -> trials of a method, by the model's size."""
    found = study.own(rows, sweep())
    models = sorted({study.value(row, "model.name") for row in found}, key=study.size)
    return study.by_value(found, "model.name", models, method__name=method)


def pairs_by_model(rows: Sequence[Row]) -> dict[str, list[tuple[Row, Row]]]:
    """Model -> pairs of full fine-tuning and a prompt, of models that have some, by size."""
    full, prompt = trials(rows, "full"), trials(rows, "prompt")
    found = {model: study.pairs(some, prompt.get(model, [])) for model, some in full.items()}
    return {model: paired for model, paired in found.items() if paired}


def gaps(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Model -> points by which full fine-tuning is ahead, by size."""
    found = {model: study.difference(paired) for model, paired in pairs_by_model(rows).items()}
    return {model: gap for model, gap in found.items() if gap}


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""
    found, full, prompt = gaps(rows), trials(rows, "full"), trials(rows, "prompt")
    sizes = [math.log10(study.size(model)) for model in found]
    change = slope(sizes, list(found.values())) if len(found) > 1 else None

    def at(model: str) -> tuple[list[Row], list[Row]]:
        return full.get(model, []), prompt.get(model, [])

    return [
        study.Finding(
            "the gap shrinks with size (points a tenfold)",
            "3.0 points at Small, 10.6 at Base, 6.8 at Large, 3.9 at XL, 1.1 at XXL",
            change,
            at_most(0),
            min(map(len, pairs_by_model(rows).values()), default=0),
        ),
        study.compared(
            "the gap is at least 15 points at the smallest model",
            "3.0 points at Small; at most 10.6, at Base",
            *at("ladder/d0"),
            at_least(15),
        ),
        study.compared(
            "the gap is at most 5 points at the largest model",
            "1.1 points at XXL",
            *at(study.SMOLLM2),
            at_most(5),
        ),
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each model."""
    found = {method: trials(rows, method) for method in METHODS}
    models = sorted({model for some in found.values() for model in some}, key=study.size)
    gap, lines = gaps(rows), []
    for model in models:
        line: dict[str, object] = {"model": model, "parameters": study.size(model)}
        for method in METHODS:
            some = found[method].get(model, [])
            line |= {
                f"{method}, seeds": study.seed_count(some),
                f"{method}, accuracy": study.accuracy(some),
                f"{method}, score": study.shown(study.mean(some)),
            }
        lines.append(line | {"gap": study.shown(gap.get(model))})
    return pd.DataFrame(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns scores by the size of the model, a line for each method."""
    series = {
        method: [
            study.point(study.size(model), some) for model, some in trials(rows, method).items()
        ]
        for method in METHODS
    }
    return length_plot(
        series, {}, xlabel="Parameters", ylabel="Score (points)", title="Figure 1: size"
    )
