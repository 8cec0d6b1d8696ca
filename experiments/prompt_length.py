"""How long must a soft prompt be, and how should it start?

Question: on a frozen SmolLM2-135M-Instruct and movie-snippet sentiment, how does test accuracy
depend on prompt length and on initialisation, and what does a prompt gain over zero-shot and
few-shot prompting?

Prediction, from the paper's Figure 3 at small model sizes: one vector is too few, more than 20 gain
little, and class labels are a better initialisation than sampled vocabulary, which is better than
random uniform.

Command:
    softprompt sweep prompt_length --workdir runs/prompt_length
    softprompt sweep prompt_length --subset quickstart --workdir runs/quickstart   (make quickstart)

Cost: 40 trials (36 prompts of 240 steps, 4 baselines); the quickstart subset has 6 (2 prompts of 50
steps of 8 examples, validated on 100 and tested on 1,000; 8 shots instead of 16).

Expected, quickstart, seed 0, bfloat16: zero-shot 0.798; 8 shots 0.703 on average; prompts of 20 and
100 vectors from labels 0.858, 0.852. With 16 examples a step and 2,000 test examples, earlier: 20
from labels 0.859 to 0.864, where products round differently; 20 and 100 vocabulary rows 0.827 to
0.852 and 0.834 to 0.874; one vector 0.813; 16 shots 0.805, 0.700 and 0.779. The full grid has not
been run.
"""

import itertools
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from softprompt.analysis.plots import Point, length_plot
from softprompt.analysis.tables import mark_best, subject, summarise
from softprompt.config import ConfigDict, base_config
from softprompt.errors import unknown
from softprompt.results import Row

LENGTHS = (1, 5, 20, 100)
INITS = ("uniform", "vocabulary", "labels")
SEEDS = (0, 1, 2)
STEPS = {"full": 240, "quickstart": 50}
BATCH = {"full": 16, "quickstart": 8}
SHOTS = {"full": 16, "quickstart": 8}
VALIDATION = {"full": 1000, "quickstart": 100}  # examples
TEST = {"full": 0, "quickstart": 1000}  # examples, 0 for all

CAPTION = (
    "Test accuracy with its 95 % interval over test examples and seeds. The prompt marked as "
    "chosen has the best validation accuracy."
)


# (prompt length, initialisation, seed)
POINTS = {
    "full": list(itertools.product(LENGTHS, INITS, SEEDS)),
    "quickstart": [(20, "labels", 0), (100, "labels", 0)],
}


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full" or "quickstart", baselines first.

    Raises:
        UserError: another subset.
    """
    if subset not in POINTS:
        raise unknown("subset", subset, POINTS)
    baselines = [_trial(subset, "none", 0)] + [_trial(subset, "fewshot", seed) for seed in SEEDS]
    return baselines + [_prompt(subset, *point) for point in POINTS[subset]]


def _trial(subset: str, method: str, seed: int) -> ConfigDict:
    config = base_config()
    config.method.name, config.seed = method, seed
    if method == "fewshot":
        config.method.shots = SHOTS[subset]
    config.data.validation_examples = VALIDATION[subset]
    config.data.test_examples = TEST[subset]
    return config


def _prompt(subset: str, length: int, init: str, seed: int) -> ConfigDict:
    config = _trial(subset, "prompt", seed)
    config.method.length, config.method.init = length, init
    config.train.steps, config.train.batch = STEPS[subset], BATCH[subset]
    config.optimizer.warmup = STEPS[subset] // 10
    config.eval.every = STEPS[subset] // 2
    return config


METHODS = {"none": "zero-shot", "fewshot": "few-shot", "prompt": "soft prompt"}


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each method, length and initialisation."""
    summary = _summary(rows)
    prompts = summary["method"] == METHODS["prompt"]
    marked = mark_best(summary, by="validation accuracy", among=prompts)
    return marked.drop(columns="values")


def _summary(rows: Sequence[Row]) -> pd.DataFrame:
    return summarise(
        sorted(rows, key=_order),
        {
            "method": _name,
            "length": lambda row: _if_prompt(row, row["config"]["method"]["length"]),
            "init": lambda row: _if_prompt(row, row["config"]["method"]["init"]),
        },
    )


def _order(row: Row) -> tuple[int, int, int, int]:
    """Baselines first, then by length, initialisation and seed."""
    method = row["config"]["method"]
    inits = {name: n for n, name in enumerate(INITS)}
    methods = {name: n for n, name in enumerate(METHODS)}
    init = inits.get(method["init"], len(INITS))
    rank = methods.get(method["name"], len(METHODS))
    return rank, method["length"], init, row["config"]["seed"]


def _name(row: Row) -> str:
    """The name of a method in the table, also of methods that this experiment does not have."""
    name = row["config"]["method"]["name"]
    return METHODS.get(name, name)


def _if_prompt(row: Row, value: object) -> object:
    return value if row["config"]["method"]["name"] == "prompt" else None


def figure(rows: Sequence[Row]) -> Figure:
    """Returns test accuracy by prompt length, a line for each initialisation."""
    lines: dict[str, list[Point]] = {init: [] for init in INITS}
    bands: dict[str, Point] = {}
    for line in _summary(rows).to_dict("records"):
        if not line["values"]:
            continue
        point = Point(
            x=line["length"] or 0,
            mean=100 * line["test accuracy"],
            low=100 * line["low"],
            high=100 * line["high"],
            values=tuple(100 * value for value in line["values"]),
        )
        if line["method"] == METHODS["prompt"]:
            lines.setdefault(line["init"], []).append(point)
        else:
            bands[line["method"]] = point
    return length_plot(
        lines,
        bands,
        xlabel="Prompt length (vectors)",
        ylabel="Test accuracy (%)",
        title=subject(rows),
    )
