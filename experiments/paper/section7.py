"""Section 7: what lies near the vectors of a trained prompt?

Question: do prompts that start from labels keep the labels among their nearest tokens, are the
neighbours alike, and how far did the vectors move?

Prediction: labels persist as neighbours of at least 0.9 of their vectors, since prompts move
little. It is refuted if they persist for less than half. All prompts of the study on SmolLM2 that
start from labels count, of any length, task, number of examples and rate. Vectors of one prompt may
be alike, so the interval counts prompts: 35 are the fewest whose interval can lie above 0.9. It was
asked of Figure 1's three prompts first, and of the others once their six vectors were known.

Command:
    softprompt sweep paper/everything --workdir runs/paper
    python -m experiments.paper.report --workdir runs/paper

Cost: no trials of its own. The report loads SmolLM2 and measures the prompts: 43 of them within two
and a half minutes on two x86 cores.

Found: 1 undecided. Undecided: label vectors that keep their label as a neighbour (%; 43 prompts,
113 vectors): 97.7 (87.9 to 99.6). The reason that the prediction gives fails: Figure 1's vectors
moved by 0.52 to 0.63 of their norm at the start, and their labels stayed near all the same. The
prompt that lost a label is one of Table 6's random settings.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath
from matplotlib.figure import Figure

from experiments.paper import data_size, figure1, figure3_length, spot, study, table3, table6
from softprompt.analysis import geometry
from softprompt.analysis.comparisons import Estimate, at_least
from softprompt.analysis.plots import Point, category_plot
from softprompt.analysis.tables import wilson_interval
from softprompt.config import ConfigDict, task_names, trial_id
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
    f"Prompts for {MODEL} that started from labels, and the {NEAR} nearest tokens of each vector "
    "by cosine; numbers are means over prompts. Label persistence: label vectors with a token of "
    "their label among them. Tightness: mean cosine between the tokens. Duplicates: vectors "
    "whose nearest token is also that of an earlier one. Norm: over that of the vocabulary's "
    "rows. Displacement: mean distance moved over the norm at the start. The interval of label "
    "persistence is Wilson's for as many yes-or-no answers as there are prompts, which is wide "
    "enough however alike the vectors of a prompt are. Prompts that share a seed or a task are "
    "taken as independent."
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
    train = prepared.data.train
    labels = [train.without_eos(ids).tolist() for ids in train.candidates][: len(prompt_PD)]
    numbers = geometry.measures(found, prompt_PD, start_PD, embedding_VD, labels)
    random = geometry.neighbours(random_PD, embedding_VD, count=NEAR)
    return numbers | {
        SHARES[2]: float(random.tightness.mean()),
        "labels": len(labels),
        "nearest": [
            [loaded.tokenizer.decode([token]) for token in near]
            for near in found.ids[: len(labels)].tolist()
        ],
    }


def configs() -> list[ConfigDict]:
    """The study's prompts of the largest model that start from labels, each once."""
    swept = (figure1, figure3_length, table3, spot, data_size, table6)
    found = {
        trial_id(config): config
        for artefact in swept
        for config in artefact.sweep()
        if (config.model.name, config.method.name) == (MODEL, "prompt")
        and config.method.init == "labels"
    }
    return list(found.values())


def prompts(rows: Sequence[Row]) -> list[Row]:
    """Their finished trials."""
    return study.select(study.own(rows, configs()))


def measured(rows: Sequence[Row]) -> list[Row]:
    """Those whose geometry was measured."""
    return [row for row in prompts(rows) if "geometry" in row]


def trials(rows: Sequence[Row]) -> list[Row]:
    """Figure 1's prompts on movie snippets that were measured, whose vectors are kept too."""
    return [row for row in figure1.trials(rows, "prompt").get(MODEL, []) if "geometry" in row]


def persistence(found: Sequence[Row]) -> Estimate:
    """The share of label vectors that keep their label, the mean over prompts.

    A prompt's share varies at most as a yes or no of the same mean does: Wilson's interval.
    """
    shares_N = np.array([row["geometry"][SHARES[0]] for row in found])
    low, high = wilson_interval(float(shares_N.mean()), len(shares_N))
    return Estimate(float(shares_N.mean()), low, high, shares_N)


def label_vectors(found: Sequence[Row]) -> int:
    """The number of label vectors of prompts."""
    return sum(row["geometry"]["labels"] for row in found)


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction, and what was found."""
    found = measured(rows)
    counts = f"; {len(found)} prompts, {label_vectors(found)} vectors" if found else ""
    return [
        study.Finding(
            f"label vectors that keep their label as a neighbour (%{counts})",
            "class labels persist as nearest neighbours",
            study.in_points(persistence(found)) if found else None,
            at_least(90, refuted_below=50),
            len({study.value(row, "seed") for row in found}),
        )
    ]


def kind(row: Row) -> tuple[str, int]:
    """What a prompt was trained on, and its length."""
    return ", ".join(task_names(row["config"])), study.value(row, "method.length")


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each task and length, with the neighbours of two vectors of a prompt."""
    kinds: dict[tuple[str, int], list[Row]] = {}
    for row in measured(rows):
        kinds.setdefault(kind(row), []).append(row)
    lines = []
    for (task, length), some in sorted(kinds.items()):
        numbers = [[row["geometry"][name] for name in NUMBERS] for row in some]
        near = some[0]["geometry"]["nearest"][:2]
        lines.append(
            {"trained on": task, "length": length, "prompts": len(some)}
            | {"label vectors": label_vectors(some)}
            | dict(zip(NUMBERS, np.mean(numbers, axis=0).round(3), strict=True))
            | {"nearest to the first two": " | ".join("; ".join(map(str.strip, n)) for n in near)}
        )
    return pd.DataFrame(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the means of the shares by the prompts' length, with those of each prompt."""
    found, series = measured(rows), {}
    for length in sorted({study.value(row, "method.length") for row in found}):
        some = study.select(found, method__length=length)
        each = {name: tuple(row["geometry"][name] for row in some) for name in SHARES}
        means = {name: float(np.mean(values)) for name, values in each.items()}
        series[f"P = {length}"] = {name: Point(0, m, m, m, each[name]) for name, m in means.items()}
    return category_plot(series, {}, ylabel="Share or cosine", title="Section 7")
