"""What do 8 and 4 bits cost a frozen model, and a prompt that is trained on it?

Question: how much smaller do the frozen weights become, how much does the perplexity of plain text
grow, how long does a training step take, and does a prompt still learn?

Prediction: int8 raises perplexity by less than 1 %, int4 by some per cent, more on the smaller
model. A prompt makes up for both, since it is trained on the rounded weights.

Command, with any text of more than 65,536 tokens; the second model asks to accept its terms:
    softprompt sweep quantization --workdir runs/quantization --config.eval.text=wikitext2/test.txt
    softprompt sweep quantization --subset smollm2 --workdir runs/small --config.eval.text=...

Cost: 8 trials a model (a zero-shot one that scores the text, and a prompt of 50 steps, for each of
four forms), about 15 minutes for the smaller and 30 for the larger on two x86 cores.

int8 has a scale for each output channel. int4 has a scale and a minimum in float16 for every 32
values along the input, five bits a value in all. Both include the embedding and a tied head.

The files of these models are quantised already. SmolLM2's layers are Q4_1, which int4 represents
exactly, and its embedding has 8 bits, so int4 rounds the embedding alone. Gemma's layers have 4, 5,
6 and 8 bits and are rounded again to another grid.

Expected: SmolLM2's perplexity is 26.53 in float32, 26.52 in int8 and 27.96 in int4 (538, 135 and 84
MB); Gemma's 51.67, 51.36 and 64.04 (1,072, 270 and 168 MB). See experiments/LOG.md.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import pandas as pd
from matplotlib.figure import Figure

from softprompt.analysis.plots import named_points
from softprompt.analysis.tables import by_differences, mean, subject, without_empty
from softprompt.config import ConfigDict, base_config
from softprompt.errors import unknown
from softprompt.results import Row

MODELS = {"smollm2": "smollm2-135m-instruct-q4", "gemma3": "gemma3-270m-q4"}
FORMS = (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "int4"))

CAPTION = (
    "Weights in memory, perplexity of plain text, and test accuracy without and with a prompt that "
    "is trained on those weights. Change: against the same weights in float32."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full", or of one model: "smollm2" or "gemma3".

    Raises:
        UserError: another subset.
    """
    if subset not in ("full", *MODELS):
        raise unknown("subset", subset, ("full", *MODELS))
    chosen = MODELS if subset == "full" else {subset: MODELS[subset]}
    return [
        _trial(model, dtype, quantize, method)
        for model in chosen.values()
        for dtype, quantize in FORMS
        for method in ("none", "prompt")
    ]


def _trial(model: str, dtype: str, quantize: str, method: str) -> ConfigDict:
    config = base_config()
    config.model.name, config.model.dtype, config.model.quantize = model, dtype, quantize
    config.method.name = method
    config.data.validation_examples, config.data.test_examples = 100, 500
    if method == "prompt":
        config.train.steps, config.train.batch, config.optimizer.warmup = 50, 16, 5
        config.optimizer.rate_unit, config.optimizer.rate = "embedding_rms", 0.08
        config.log.every = 1
    return config


Key = tuple[str, str, str]


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line a model and form, of the mean over seeds.

    Trials of a form that differ otherwise, as in their text, are several lines, and a column "also"
    shows the difference.
    """
    forms: dict[Key, list[Row]] = {}
    for row in rows:
        model = row["config"]["model"]
        forms.setdefault((model["name"], model["dtype"], model["quantize"]), []).append(row)
    lines = [line for key in sorted(forms, key=_place) for line in _lines(key, forms)]
    frame = pd.DataFrame(lines, dtype=object)
    return without_empty(frame, "also") if lines else frame


def _place(key: Key) -> tuple[int, int]:
    names, form = list(MODELS.values()), (key[1], key[2])
    name = names.index(key[0]) if key[0] in names else len(names)
    return name, FORMS.index(form) if form in FORMS else len(FORMS)


def _zero_shot(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows without a prompt, grouped by their differences other than the seed."""
    plain = [row for row in rows if row["config"]["method"]["name"] == "none"]
    return by_differences(plain, ignored={"seed"}) or {"": []}


def _lines(key: Key, forms: dict[Key, list[Row]]) -> Iterator[dict[str, object]]:
    """The lines of a form: one where its trials differ in the seed alone."""
    exact = _zero_shot(forms.get((key[0], "float32", "none"), []))
    trained = [row for row in forms[key] if row["config"]["method"]["name"] == "prompt"]
    pairs = product(_zero_shot(forms[key]).items(), (by_differences(trained) or {"": []}).items())
    for (text, plain), (training, prompt) in pairs:
        perplexity = mean(_metric(plain, "text", "perplexity"))
        whole = mean(_metric(exact.get(text, []), "text", "perplexity"))
        seconds = mean([row["step_seconds"] for row in prompt if row["step_seconds"]])
        size = next((row["weight_bytes"] for row in plain + prompt if row["weight_bytes"]), None)
        yield {
            "model": key[0],
            "dtype": key[1],
            "quantize": key[2],
            "also": ", ".join(filter(None, (text, training))),
            "weights MB": size and round(size / 1e6, 1),
            "perplexity": perplexity and f"{perplexity:.2f}",
            "change": f"{perplexity / whole - 1:+.2%}" if perplexity and whole else None,
            "zero-shot": mean(_metric(plain, "test", "accuracy")),
            "prompt": mean(_metric(prompt, "test", "accuracy")),
            "step seconds": seconds and round(seconds, 2),
        }


def _metric(rows: Sequence[Row], part: str, name: str) -> list[float]:
    """A number of the trials that have it."""
    parts = [row["metrics"].get(part, {}) for row in rows]
    return [found[name] for found in parts if found.get(name) is not None]


def figure(rows: Sequence[Row]) -> Figure:
    """Returns perplexity against the size of the weights, a series a model."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    for line in table(rows).to_dict("records"):
        if line["perplexity"] is not None and line["weights MB"] is not None:
            name = line["dtype"] if line["quantize"] == "none" else line["quantize"]
            point = (float(line["weights MB"]), float(line["perplexity"]), name)
            series.setdefault(line["model"], []).append(point)
    return named_points(
        series,
        xlabel="Frozen weights (MB)",
        ylabel="Perplexity of plain text",
        title=f"What rounding costs: {subject(rows)}",
    )
