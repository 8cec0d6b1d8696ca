"""Data size: with how many examples does full fine-tuning overtake a prompt?

Question: trained on 30, 300 and 3,000 movie snippets, which of the two scores higher?

Prediction: with 30 a prompt is at least as good; with 300 and with 3,000 full fine-tuning is. Each
is refuted if the other method is ahead.

Command:
    softprompt sweep paper/data_size --workdir runs/paper

Cost: 18 trials on SmolLM2, of which 11 have run: 24 minutes on two x86 cores, beside other work.

Found: 1 holds, 2 undecided. Holds: with 3,000 examples full fine-tuning is at least as good as a
prompt: 5.9 (2.2 to 9.7). Undecided: with 30 examples a prompt is at least as good as full
fine-tuning: -3.7 (-9.4 to 2.0); with 300 examples full fine-tuning is at least as good as a prompt:
-0.1 (-5.9 to 5.7).
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import at_least
from softprompt.analysis.plots import length_plot
from softprompt.config import ConfigDict
from softprompt.results import Row

MODEL = study.SMOLLM2
SIZES = (30, 300, 3000)
NAMES = {"prompt": "a prompt", "full": "full fine-tuning"}

CAPTION = f"{study.SCORE_CAPTION} Each seed trains on other examples, for equally many steps."


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full".

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    return [
        study.trial(MODEL, method, seed, data__train_examples=count, data__subset_seed=seed)
        for count in SIZES
        for seed in study.SEEDS
        for method in NAMES
    ]


def by_size(rows: Sequence[Row], method: str) -> dict[int, list[Row]]:
    """Training examples -> trials of a method."""
    found = study.own(rows, sweep())
    return study.by_value(found, "data.train_examples", SIZES, method__name=method)


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""
    found = {method: by_size(rows, method) for method in NAMES}
    few, some, many = SIZES
    orders = ((few, "prompt", "full"), (some, "full", "prompt"), (many, "full", "prompt"))
    return [
        study.compared(
            f"with {count:,} examples {NAMES[one]} is at least as good as {NAMES[other]}",
            "",
            found[one].get(count, []),
            found[other].get(count, []),
            at_least(0),
        )
        for count, one, other in orders
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each method and number of examples."""
    parts = []
    for method in NAMES:
        part = study.score_table("examples", by_size(rows, method))
        part.insert(0, "method", method)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the score by the number of examples, a line for each method."""
    series = {
        method: [study.point(count, some) for count, some in by_size(rows, method).items()]
        for method in NAMES
    }
    return length_plot(
        series, {}, xlabel="Training examples", ylabel="Score (points)", title="Data size"
    )
