"""How long must a soft prompt be, and how should it start?

Question: on a frozen SmolLM2-135M-Instruct and movie-snippet sentiment, how does test accuracy
depend on prompt length and on initialisation, and what does a prompt gain over zero-shot and
few-shot prompting?

Prediction: as in the paper's Figure 3 at small model sizes, more than one vector matters, beyond 20
little is gained, and class labels start better than sampled vocabulary, which starts better than
random uniform.

Command:
    softprompt sweep prompt_length --workdir runs/prompt_length
    softprompt sweep prompt_length --subset quickstart --workdir runs/quickstart   (make quickstart)

Cost: 40 trials (36 prompts of 120 steps, 4 baselines); the quickstart subset has 8 (4 prompts).
"""

from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib.figure import Figure

from softprompt.analysis.plots import Point, length_plot
from softprompt.analysis.tables import mark_best, summarise
from softprompt.config import ConfigDict, base_config
from softprompt.errors import unknown
from softprompt.results import Row

LENGTHS = (1, 5, 20, 100)
INITS = ("uniform", "vocabulary", "labels")
SEEDS = (0, 1, 2)
STEPS = 120

CAPTION = (
    "Test accuracy with a 95 % interval: Student's t over seeds where there are several, else "
    "Wilson's over the test examples. The prompt marked as chosen has the best validation accuracy."
)


def _prompt(length: int, init: str, seed: int) -> ConfigDict:
    config = base_config()
    config.seed = seed
    config.method.length = length
    config.method.init = init
    config.train.steps = STEPS
    config.optimizer.warmup = 10
    return config


def _baselines() -> list[ConfigDict]:
    """Zero-shot once, and few-shot with three draws of examples."""
    zero = base_config()
    zero.method.name = "none"
    draws = []
    for seed in SEEDS:
        config = base_config()
        config.method.name = "fewshot"
        config.seed = seed
        draws.append(config)
    return [zero, *draws]


def _full() -> list[ConfigDict]:
    grid = [(length, init, seed) for length in LENGTHS for init in INITS for seed in SEEDS]
    return _baselines() + [_prompt(*point) for point in grid]


def _quickstart() -> list[ConfigDict]:
    points = [(20, "vocabulary"), (20, "labels"), (5, "vocabulary"), (100, "vocabulary")]
    return _baselines() + [_prompt(length, init, 0) for length, init in points]


SUBSETS: dict[str, Callable[[], list[ConfigDict]]] = {"full": _full, "quickstart": _quickstart}


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full" or "quickstart", baselines first."""
    if subset not in SUBSETS:
        raise unknown("subset", subset, SUBSETS)
    return SUBSETS[subset]()


METHODS = {"none": "zero-shot", "fewshot": "few-shot", "prompt": "soft prompt"}


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line a method, length and initialisation; failed trials show in `status`."""
    summary = _summary(rows)
    prompts = summary["method"] == METHODS["prompt"]
    marked = mark_best(summary, by="validation accuracy", among=prompts)
    return marked.drop(columns="values")


def _summary(rows: Sequence[Row]) -> pd.DataFrame:
    return summarise(
        sorted(rows, key=_order),
        {
            "method": lambda row: METHODS[row["config"]["method"]["name"]],
            "length": lambda row: _if_prompt(row, row["config"]["method"]["length"]),
            "init": lambda row: _if_prompt(row, row["config"]["method"]["init"]),
        },
    )


def _order(row: Row) -> tuple[int, int, int, int]:
    """Baselines first, then by length, initialisation and seed."""
    method = row["config"]["method"]
    known = {name: place for place, name in enumerate(INITS)}
    place = known.get(method["init"], len(INITS))
    return list(METHODS).index(method["name"]), method["length"], place, row["config"]["seed"]


def _if_prompt(row: Row, value: object) -> object:
    return value if row["config"]["method"]["name"] == "prompt" else None


def figure(rows: Sequence[Row]) -> Figure:
    """Returns test accuracy against prompt length, a line an initialisation, a band a baseline."""
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
        title="Movie-snippet sentiment, frozen SmolLM2-135M-Instruct",
    )
