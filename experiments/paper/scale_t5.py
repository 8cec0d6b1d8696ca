"""The paper's own setting: prompts of 100 vectors on T5 1.1 from Small to XXL, on SuperGLUE.

Question: do prompts reach the scores that the paper reports at each size, beside which it reports
those of full fine-tuning?

Prediction, from the paper's Figure 1 in the numbers that Vu et al. 2022 print: prompts score 59.8,
63.1, 74.5, 79.2 and 88.8 on average; full fine-tuning 62.8, 73.7, 81.3, 83.1 and 89.9.

Command:
    python -m experiments.paper.scale_t5                          (costs, from shapes alone)
    softprompt sweep paper/scale_t5 --subset base --workdir gs://BUCKET/t5

Cost: 120 trials of 30,000 steps of 32 examples. The first command traces each size and set at full
size, and prints memory and chip-hours of Cloud TPU v5e. The numbers are in docs/study.md.

Expected: not run. The setting is that of configs/paper.py.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.plots import named_points
from softprompt.analysis.tables import to_markdown
from softprompt.config import ConfigDict
from softprompt.config.files import load_config
from softprompt.errors import UserError, unknown
from softprompt.models.shapes import parameter_count
from softprompt.pretrained.catalog import CATALOG
from softprompt.results import Row
from softprompt.trials.trial_cost import GIB, trial_cost

SIZES = ("small", "base", "large", "xl", "xxl")
SETS = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
SCORE = "generated_task_score"  # the mean of the metrics that the paper reports for a set
# Size -> SuperGLUE's score of prompts and of full fine-tuning. Source: Vu et al. 2022, Table 4.
PRINTED = {
    "small": (59.8, 62.8),
    "base": (63.1, 73.7),
    "large": (74.5, 81.3),
    "xl": (79.2, 83.1),
    "xxl": (88.8, 89.9),
}

CAPTION = "SuperGLUE's score on the development sets: the mean over sets of the paper's metrics."


def trial(size: str, name: str, seed: int = 0) -> ConfigDict:
    """A trial of the paper."""
    return load_config(f"configs/paper.py:{size},task={name}_dev,seed={seed}")


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full", or of one size, such as "base".

    Raises:
        UserError: another subset.
    """
    if subset not in ("full", *SIZES):
        raise unknown("subset", subset, ("full", *SIZES))
    return [
        trial(size, name, seed)
        for size in SIZES
        if subset in ("full", size)
        for seed in study.SEEDS
        for name in SETS
    ]


def costs(
    sizes: Sequence[str] = SIZES,
    sets: Sequence[str] = SETS,
    cost: Callable[[ConfigDict], dict[str, Any]] = trial_cost,
) -> pd.DataFrame:
    """What the trials of each size take: a line a size, over all sets and seeds, and the total."""
    lines, total = [], 0.0
    for size in sizes:
        found = [cost(trial(size, name)) for name in sets]
        hours = len(study.SEEDS) * sum(one["chip_hours"] for one in found)
        largest = max(found, key=lambda one: one["activation_bytes"])
        parts = ("weight_bytes", "delta_bytes", "activation_bytes")
        total += hours
        lines.append(
            {
                "size": size,
                "trials": str(len(study.SEEDS) * len(found)),
                "frozen": f"{found[0]['frozen']:,}",
                "trained": f"{found[0]['trained']:,}",
                "memory a chip (GiB)": f"{sum(largest[part] for part in parts) / GIB:.1f}",
                "fits": "yes" if all(one["fits"] for one in found) else "with microbatches",
                "chip-hours": f"{hours:,.0f}",
            }
        )
    return pd.DataFrame([*lines, {"size": "total", "chip-hours": f"{total:,.0f}"}]).fillna("")


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each size whose sets all have a trial: SuperGLUE's score."""
    own, lines = study.own(rows, sweep(), answered=False), []
    for size in SIZES:
        model = f"google/t5-{size}-lm-adapt"
        means = {}
        for name in SETS:
            some = study.select(own, model__name=model, task__name=f"{name}_dev")
            found = [row["metrics"]["test"][SCORE] for row in some]
            if found:
                means[name] = sum(found) / len(found)
        if len(means) == len(SETS):
            score = 100 * sum(means.values()) / len(means)
            prompt, full = PRINTED[size]
            lines.append(
                {"size": size, "score": round(score, 1), "paper": prompt, "paper, full": full}
            )
    return pd.DataFrame(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns SuperGLUE's score by size, beside the paper's."""
    found = {line["size"]: line["score"] for line in table(rows).to_dict("records")}
    printed = {"paper, prompt": 0, "paper, full fine-tuning": 1}
    counts = {size: parameter_count(CATALOG[f"google/t5-v1_1-{size}"].config) for size in SIZES}
    series = {
        name: [(float(counts[size]), PRINTED[size][n], "") for size in SIZES]
        for name, n in printed.items()
    }
    series["here, prompt"] = [(float(counts[size]), score, "") for size, score in found.items()]
    return named_points(series, xlabel="Parameters", ylabel="SuperGLUE", title="Figure 1 on T5 1.1")


if __name__ == "__main__":
    try:
        print(to_markdown(costs()), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
