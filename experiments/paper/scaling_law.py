"""The scaling law: do smaller models predict the test loss of a larger one?

Question: the loss E + A N^-a is fitted to the trials of Figure 1 on the ladder's smaller models, of
N parameters each. How far is it from the loss that was measured on the largest? And how does the
loss depend on the length P of a prompt? The loss is the mean cross-entropy of the right label among
the task's labels on the test examples; the same answer to two equally frequent labels costs 0.69.

Prediction: the law is within 10 % of the loss on d4, for full fine-tuning and for a prompt. It is
refuted if it is further away, and undecided where no model is above chance. A longer prompt gains
little: on SmolLM2, where the loss is A P^-a, ten times the length lowers it by at most 10 %. It is
refuted if that is more. The trials of d4 ran after this was written, those of the lengths before.

Command:
    softprompt sweep paper/figure1 --workdir runs/paper
    softprompt sweep paper/figure3_length --workdir runs/paper

Cost: no trials of its own.

Found: 1 refuted, 2 undecided. Refuted: ten times the length lowers the loss by at most 10 % (%):
16.3 (12.3 to 20.1). Undecided: the law of the smaller models is within 10 % of full fine-tuning's
loss on d4 (% away): 5.2 (0.2 to 18.6); the law of the smaller models is within 10 % of a prompt's
loss on d4 (% away).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import figure1, figure3_length, study
from softprompt.analysis.comparisons import Estimate, Scores, at_most, estimate, mean_score
from softprompt.analysis.plots import COLOURS, Point, length_plot
from softprompt.analysis.scaling import FEWEST, ScalingLaw, extrapolation_error, fit_with_interval
from softprompt.results import Row
from softprompt.trials.records import label_nats

METHODS = {"full": "full fine-tuning", "prompt": "a prompt"}
HELD_OUT = "ladder/d4"
LADDER = [model for model in figure1.MODELS["full"] if model != study.SMOLLM2]

CAPTION = (
    "Mean cross-entropy of the right label among the task's labels, in nats, on the test examples, "
    "with its 95 % interval over seeds and examples, cut at 0. Dashed: the law that is fitted "
    "without d4, whose exponent is in the last line of its method; 10 is the largest that is "
    "looked for, where all models but the smallest are alike. Trials select by validation "
    "accuracy, not by this loss."
)

# (task, seed) -> cross-entropy of each test example's right label
Losses = dict[tuple[str, int], npt.NDArray[np.floating]]


def measured(trials: Sequence[Row]) -> Losses:
    """The losses of the trials whose labels were scored."""
    scored = {
        key: row
        for key, row in study.keyed(trials).items()
        if "label_centinats" in row["answers"][key[0]]
    }
    return {key: label_nats([row], key[0])[0] for key, row in scored.items()}


def by_model(trials: Mapping[str, Sequence[Row]]) -> dict[str, Losses]:
    """Model of the ladder -> losses of the tasks and seeds that all its models have, by size.

    `trials` are those of a method by model; see `figure1.by_line`.
    """
    found = {model: measured(trials[model]) for model in LADDER if model in trials}
    common = sorted(set.intersection(*map(set, found.values()))) if found else []
    return {model: {key: some[key] for key in common} for model, some in found.items() if common}


def columns(found: Mapping[str, Losses]) -> tuple[list[float], Scores, list[Any]]:
    """The size, the losses [trials, examples], and the task with the seed of each trial."""
    flat = [(study.size(one), loss, key) for one in found for key, loss in found[one].items()]
    sizes, losses, clusters = (list(column) for column in zip(*flat, strict=True))
    return sizes, np.array(losses), clusters


def distance(trials: Mapping[str, Sequence[Row]]) -> tuple[Estimate | None, int]:
    """How far the law is from the held-out loss, in %, either way; and the number of seeds.

    None where the models are too few, or none is above chance.
    """
    found = by_model(trials)
    seeds = len({seed for _, seed in found.get(HELD_OUT, {})})
    if seeds < 2 or len(found) <= FEWEST:
        return None, 0
    if not study.above_chance(*(trials[model] for model in found)):
        return None, seeds
    error = extrapolation_error(*columns(found), study.size(HELD_OUT))
    return estimate(100 * abs(error.value), 100 * np.abs(error.draws)), seeds


def length_exponent(rows: Sequence[Row]) -> tuple[Estimate | None, int]:
    """The exponent a of a prompt's loss, A P^-a for P vectors; and the number of seeds.

    It is a least-squares slope of logarithms. To first order it is a sum over the losses of single
    examples, whose interval is over seeds and examples.
    """
    found = {n: measured(trials) for n, trials in figure3_length.by_length(rows).items()}
    common = set.intersection(*map(set, found.values())) if len(found) >= FEWEST else set()
    if not common:
        return None, 0
    losses_LSE = np.array([[some[key] for key in sorted(common)] for some in found.values()])
    logs_L, means_L = np.log(list(found)), losses_LSE.mean((1, 2))
    slopes_L = (logs_L - logs_L.mean()) / np.square(logs_L - logs_L.mean()).sum()
    exponent = -float(slopes_L @ np.log(means_L))
    first_order = mean_score({"": -np.tensordot(slopes_L / means_L, losses_LSE, 1)})
    return estimate(exponent, exponent + first_order.draws - first_order.value), len(common)


def length_gain(exponent: Estimate) -> Estimate:
    """By how many % ten times the length lowers the loss."""
    return estimate(100 * (1 - 10**-exponent.value), 100 * (1 - 10**-exponent.draws))


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""
    made, lines = [], figure1.by_line(rows)
    for method, name in METHODS.items():
        claim = f"the law of the smaller models is within 10 % of {name}'s loss on d4 (% away)"
        found, seeds = distance(lines[method])
        made.append(study.Finding(claim, "", found, at_most(10), seeds))
    claim = "ten times the length lowers the loss by at most 10 % (%)"
    exponent, seeds = length_exponent(rows)
    gain = exponent and length_gain(exponent)
    made.append(study.Finding(claim, "beyond 20 little is gained", gain, at_most(10), seeds))
    return made


def law_of_smaller(found: Mapping[str, Losses]) -> ScalingLaw | None:
    """The law of the models without the held-out one; None for too few models or trials."""
    smaller = {model: some for model, some in found.items() if model != HELD_OUT}
    enough = len(smaller) >= FEWEST and len(next(iter(smaller.values()))) > 1
    return fit_with_interval(*columns(smaller)) if enough else None


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each method and model: the loss, and what the law says of it."""
    lines, trials = [], figure1.by_line(rows)
    for method in METHODS:
        found = by_model(trials[method])
        law = law_of_smaller(found)
        told = f"{law.exponent:.2f} ({law.low:.2f} to {law.high:.2f})" if law else ""
        for model, some in found.items():
            line = {"trained": method, "model": model, "parameters": study.size(model)}
            line |= {"trials": len(some), "loss (nats)": f"{np.mean(list(some.values())):.3f}"}
            line["law (nats)"] = f"{float(law(study.size(model))):.3f}" if law else ""
            lines.append(line | {"exponent (95 %)": told if model == list(found)[-1] else ""})
    return pd.DataFrame(lines)


def point(model: str, losses: Losses) -> Point:
    """The mean loss of a model's trials; no loss is below 0, so neither is the interval."""
    mean = mean_score({"": np.array(list(losses.values()))})
    each = tuple(float(one.mean()) for one in losses.values())
    return Point(study.size(model), mean.value, max(0.0, mean.low), mean.high, each)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the losses by size, with the law of each method, in the colours of Figure 1."""
    trials = figure1.by_line(rows)
    found = {method: by_model(trials[method]) for method in figure1.METHODS}
    series = {name: [point(*one) for one in some.items()] for name, some in found.items()}
    title = "Scaling law: test loss by size"
    drawn = length_plot(series, {}, xlabel="Parameters", ylabel="Test loss (nats)", title=title)
    for some, colour in zip(found.values(), COLOURS, strict=False):
        if law := law_of_smaller(some):
            sizes = np.geomspace(study.size(LADDER[0]), study.size(LADDER[-1]), 50)
            drawn.axes[0].plot(sizes, law(sizes), "--", color=colour, linewidth=1)
    return drawn
