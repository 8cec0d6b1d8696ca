"""Section 7: what lies near the vectors of a trained prompt?

Question: do prompts that start from labels keep the labels among their nearest tokens, are the
neighbours alike, and how far did the vectors move?

Prediction: labels persist as neighbours of at least 0.9 of their vectors. It is refuted if they
persist for less than half. Three prompts have six label vectors, too few for an interval that lies
above 0.9: this can be refuted, and otherwise stays undecided.

Command:
    softprompt sweep paper/figure1 --workdir runs/paper
    python -m experiments.paper.report --workdir runs/paper

Cost: no trials of its own. The report loads SmolLM2 and measures the prompts of Figure 1, in half a
minute.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath
from matplotlib.figure import Figure

from experiments.paper import figure1, study
from softprompt.analysis import geometry
from softprompt.analysis.comparisons import Estimate, at_least, mean_score
from softprompt.analysis.plots import Point, category_plot
from softprompt.analysis.tables import wilson_interval
from softprompt.methods.delta_file import load_delta
from softprompt.models.quantize import embedding
from softprompt.results import Row
from softprompt.trials.prepare import initial_state, prepare
from softprompt.trials.run import DELTA, read_config
from softprompt.trials.session import Session

MODEL = study.SMOLLM2
NEAR = 5
SHARES = ("label persistence", "tightness", "tightness of random vectors", "duplicates")
NUMBERS = ("cosine to the nearest", *SHARES, "norm", "displacement")

CAPTION = (
    f"Prompts of 20 vectors for {MODEL} that started from labels, and the {NEAR} nearest tokens of "
    "each vector by cosine. Label persistence: label vectors with a token of their label among "
    "them. Tightness: mean cosine between the tokens. Duplicates: vectors whose nearest token is "
    "also that of an earlier one. Norm: over that of the vocabulary's rows. Displacement: mean "
    "distance moved over the norm at the start. Intervals over seeds; of label persistence over "
    "label vectors (Wilson's)."
)


def measure(folder: epath.PathLike, session: Session) -> dict[str, Any]:
    """The geometry of a finished trial's prompt, for its record.

    Loads the model, and makes the trial's first prompt anew.
    """
    config = read_config(folder)
    prepared = prepare(config, session)
    start_PD = np.asarray(initial_state(prepared).delta["prompt"], np.float32)
    prompt_PD = np.asarray(load_delta(epath.Path(folder) / DELTA)[0]["prompt"], np.float32)
    loaded = prepared.loaded
    rows_VD = np.asarray(embedding(loaded.weights["embed"]), np.float32)
    embedding_VD = rows_VD * loaded.config.embed_scale
    random_PD = np.asarray(np.random.default_rng(config.seed).standard_normal(prompt_PD.shape))
    found = geometry.neighbours(prompt_PD, embedding_VD, count=NEAR)
    train = prepared.tasks[0].train
    labels = [train.without_eos(ids).tolist() for ids in train.candidates]
    numbers = geometry.measures(found, prompt_PD, start_PD, embedding_VD, labels)
    random = geometry.neighbours(random_PD, embedding_VD, count=NEAR)
    return numbers | {
        SHARES[2]: float(random.tightness.mean()),
        "labels": len(labels),
        "nearest": [
            [loaded.tokenizer.decode([token]) for token in near] for near in found.ids.tolist()
        ],
    }


def prompts(rows: Sequence[Row]) -> list[Row]:
    """Figure 1's prompts of the largest model."""
    return figure1.trials(rows, "prompt").get(MODEL, [])


def trials(rows: Sequence[Row]) -> list[Row]:
    """Those that were measured."""
    return [row for row in prompts(rows) if "geometry" in row]


def mean_over_seeds(found: Sequence[Row], name: str) -> Estimate:
    """The mean of a number over seeds, with its interval; Wilson's for persistence, a share."""
    values = np.array([[row["geometry"][name]] for row in found])
    if name != SHARES[0]:
        return mean_score({"": values})
    share = float(values.mean())
    low, high = wilson_interval(share, sum(row["geometry"]["labels"] for row in found))
    return Estimate(share, low, high, np.array([share]))


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction, and what was found."""
    found = trials(rows)
    return [
        study.Finding(
            "label vectors that keep their label as a neighbour (share)",
            "class labels persist as nearest neighbours",
            mean_over_seeds(found, SHARES[0]) if found else None,
            at_least(0.9, refuted_below=0.5),
            study.seed_count(found),
        )
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each seed, with the neighbours of the first two vectors."""
    lines = []
    for row in trials(rows):
        numbers = {name: row["geometry"][name] for name in NUMBERS}
        near = ["; ".join(token.strip() for token in some) for some in row["geometry"]["nearest"]]
        lines.append(
            {"seed": study.value(row, "seed")}
            | {name: round(number, 3) for name, number in numbers.items()}
            | {"nearest to the first two": " | ".join(near[:2])}
        )
    return pd.DataFrame(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the shares, with their intervals over seeds."""
    found, series = trials(rows), {}
    for name in SHARES if found else ():
        one, each = mean_over_seeds(found, name), tuple(row["geometry"][name] for row in found)
        series[name] = Point(0, one.value, one.low, one.high, each)
    return category_plot({MODEL: series}, {}, ylabel="Share or cosine", title="Section 7")
