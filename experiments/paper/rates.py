"""Which learning rate for which model and method? The search behind the ladder's trials.

Question: of three rates, a factor of three to five apart, which gives the best validation accuracy
on each rung of the ladder? Prompts and full fine-tuning get equally many rates, steps and seeds.

Prediction: the rate decides whether anything is learnt. The rate that suits prompts, in units of
the embeddings' RMS, is the same at every size, and that of full fine-tuning falls with size.

Command:
    softprompt sweep paper/rates --workdir runs/paper_rates
    softprompt sweep paper/rates --subset d1 --workdir runs/paper_rates

Cost: 24 trials of 400 steps of 32 examples on d0 to d3; 6 on d1 took 8 minutes beside other work.
The ladder's models must be there.

Expected, d1 in bfloat16 (float32 since, not searched again), best validation accuracy on 200
snippets: full fine-tuning 0.595, 0.785 and 0.775 at 3e-4, 1e-3 and 3e-3; prompts 0.435, 0.440 and
0.435 at 0.1, 0.5 and 2.0, which is the share of one label: no rate teaches a prompt anything there.
The others have not been searched.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.plots import named_points
from softprompt.config import ConfigDict
from softprompt.errors import unknown
from softprompt.results import Row

MODELS = ("ladder/d0", "ladder/d1", "ladder/d2", "ladder/d3")

CAPTION = (
    "Best validation accuracy over the training, seed 0. The lower one of two rates with equal "
    "accuracies is chosen."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full", or of one rung, such as "d1".

    Raises:
        UserError: another subset.
    """
    rungs = {"full": MODELS} | {model.removeprefix("ladder/"): (model,) for model in MODELS}
    if subset not in rungs:
        raise unknown("subset", subset, rungs)
    return [
        study.trial(model, method, optimizer__rate=rate, data__test_examples=100)
        for model in rungs[subset]
        for method, rates in study.SEARCHED.items()
        for rate in rates
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each model, method and rate."""
    lines = [
        {
            "model": study.value(row, "model.name"),
            "method": study.value(row, "method.name"),
            "rate": study.value(row, "optimizer.rate"),
            "validation accuracy": row["metrics"]["validation"]["accuracy"],
        }
        for row in study.own(rows, sweep())
    ]
    columns = ["model", "method", "rate", "validation accuracy"]
    frame = pd.DataFrame(lines, columns=columns).sort_values(
        ["model", "method", "rate"], ignore_index=True
    )
    best = frame.groupby(["model", "method"])["validation accuracy"].idxmax()
    frame["chosen"] = ["yes" if line in set(best) else "" for line in frame.index]
    return frame


def figure(rows: Sequence[Row]) -> Figure:
    """Returns validation accuracy by rate, a line for each model and method."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    for line in table(rows).to_dict("records"):
        point = (line["rate"], 100 * line["validation accuracy"], line["chosen"] and "chosen")
        series.setdefault(f"{line['method']}, {line['model']}", []).append(point)
    return named_points(
        series,
        xlabel="Peak learning rate (prompts: in embedding RMS)",
        ylabel="Validation accuracy (%)",
        title="Rates",
    )
