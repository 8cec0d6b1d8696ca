"""Domain: does a prompt that models a text's language lower the perplexity of more such text?

Question: by how much does a prompt that was trained on verses of the Bible, as a language model,
lower the perplexity of held-out verses, and what does it do to other text?

Prediction: the perplexity of held-out verses falls by at least 20 %. It is refuted if it falls by
less. That of the State of the Union addresses stands beside it.

Command:
    softprompt sweep paper/domain --workdir runs/paper

Cost: 4 trials on SmolLM2: three of about 4 minutes on one core, and one that only measures.

Found: 1 holds. Holds: the perplexity of held-out verses falls by at least 20 % behind a verse
prompt: 52.6 (50.5 to 54.5).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.paper import study
from softprompt.analysis.comparisons import (
    Estimate,
    Scores,
    at_least,
    mean_score,
    paired_difference,
)
from softprompt.analysis.plots import Point, category_plot
from softprompt.config import ConfigDict
from softprompt.results import Row
from softprompt.trials.records import target_nats

MODEL = study.SMOLLM2
VERSES = "verses"
SOURCES = {VERSES: "tfds:verses:1.0.0", "headlines": "tfds:sarcastic_headlines:1.0.0"}
START = "\n"  # all that stands between a prompt and a text
OTHER = "sotu"
TEXTS = {VERSES: "held-out verses", OTHER: "State of the Union"}

CAPTION = (
    f"Perplexity for {MODEL} of 400 verses from chapters that the prompts, of 20 vectors, were not "
    "trained on, and of 8,176 tokens of the State of the Union addresses, with 95 % intervals over "
    "seeds and verses; of the addresses over seeds."
)


def trial(text: str, method: str, seed: int = 0) -> ConfigDict:
    """A trial on a text as a language: without an input, and with the text as the target.

    Args:
        text: one of `SOURCES`.
        method: "prompt", or "none" for the model as it is.
        seed: of the trial.
    """
    start = {"method__init": "vocabulary", "eval__metric": "log_likelihood", "eval__every": 25}
    return study.trial(
        MODEL,
        method,
        seed,
        task__name=text,
        task__source=SOURCES[text],
        task__template=START,
        task__label_field="text",
        task__max_target=256,
        data__validation_examples=100,
        data__test_examples=400,
        eval__metrics="log_likelihood",
        eval__text=OTHER,
        eval__text_tokens=8192,
        **(start if method == "prompt" else {}),
    )


def prompts(text: str) -> list[ConfigDict]:
    """The trials of prompts for a text."""
    return [trial(text, "prompt", seed) for seed in study.SEEDS]


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full": the model as it is, and a prompt for each seed.

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    return [trial(VERSES, "none"), *prompts(VERSES)]


def trials(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Finished trials without and with a prompt; {} unless there are both."""
    found = {
        "no prompt": study.own(rows, [trial(VERSES, "none")], answered=False),
        "verse prompt": study.select(study.own(rows, prompts(VERSES), answered=False)),
    }
    return found if all(found.values()) else {}


def nats(found: Sequence[Row], text: str) -> Scores:
    """The nats a token of a text in each trial, [trials, examples]; of the addresses as one."""
    if text == VERSES:
        return target_nats(found, VERSES)
    return np.array([[row["metrics"]["text"]["nats"]] for row in found])


def changed(found: Estimate, change: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """An estimate of a rising function of the number."""
    value, low, high = (float(change(np.array(x))) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high, change(found.draws))


def perplexity(found: Sequence[Row], text: str) -> Estimate:
    """The perplexity of a text, at the mean over trials of nats a token."""
    return changed(mean_score({text: nats(found, text)}), np.exp)


def fall(rows: Sequence[Row], text: str) -> Estimate | None:
    """By how much of itself, in %, a text's perplexity falls behind the prompts."""
    if not (found := trials(rows)):
        return None
    base, ours = (nats(some, text) for some in found.values())
    saved = paired_difference({text: np.repeat(base, len(ours), axis=0)}, {text: ours})
    return changed(saved, lambda x: -100 * np.expm1(-x))


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The prediction, and what was found."""
    return [
        study.Finding(
            "the perplexity of held-out verses falls by at least 20 % behind a verse prompt",
            "",
            fall(rows, VERSES),
            at_least(20),
            len(trials(rows).get("verse prompt", [])),
        )
    ]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each text."""
    found = trials(rows)
    return pd.DataFrame(
        [
            {"text": name}
            | {
                f"perplexity, {kind}": study.shown(perplexity(some, text))
                for kind, some in found.items()
            }
            | {"fall (%)": study.shown(fall(rows, text))}
            for text, name in TEXTS.items()
            if found
        ]
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the perplexity of each text, without and with a prompt."""
    series = {
        kind: {name: _point(some, text) for text, name in TEXTS.items()}
        for kind, some in trials(rows).items()
    }
    return category_plot(series, {}, ylabel="Perplexity", title="Domain")


def _point(found: Sequence[Row], text: str) -> Point:
    one = perplexity(found, text)
    each = tuple(math.exp(x) for x in nats(found, text).mean(1))
    return Point(0, one.value, one.low, one.high, each)
