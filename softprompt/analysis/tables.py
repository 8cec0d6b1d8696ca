"""Intervals for few seeds and small test sets, and tables as Markdown, CSV and LaTeX."""

import html
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from softprompt.config import base_config, flatten, scientific, task_names, with_new_names
from softprompt.evaluation.metrics import NOT_METRICS
from softprompt.results import Row, cautions

Interval = tuple[float, float]

LEVEL = 0.95  # of confidence

# Metrics that are a mean over examples of a number from 0 to 1: Wilson's interval covers them.
# Macro F1 is not. Its interval needs how often each label was taken for each other one, which a row
# does not have.
MEANS_OF_EXAMPLES = ("accuracy", "exact_match", "f1")

# Keys in which the trials of one group may differ: the seed, and what else is measured.
IGNORED = {"seed", "eval.latency", "eval.text", "eval.text_tokens", "eval.transfer"}


def wilson_interval(share: float, examples: int) -> Interval:
    """Returns Wilson's score interval for a share of examples.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    scale = 1 + z**2 / examples
    middle = (share + z**2 / (2 * examples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / examples + z**2 / (4 * examples**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(tasks: Sequence[tuple[float, int]]) -> Interval:
    """Returns an interval of the unweighted mean over tasks of a share of examples.

    A task is its share and its number of examples, at least 1. For one task it is Wilson's
    interval. For several, the distances from each share to its own limits are combined as
    independent errors are.
    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures".
    """
    shares = np.array([share for share, _ in tasks])
    limits = np.array([wilson_interval(share, examples) for share, examples in tasks])
    below, above = np.linalg.norm(limits - shares[:, None], axis=0) / len(tasks)
    return float(shares.mean() - below), float(shares.mean() + above)


def seeds_interval(seeds: Sequence[Sequence[tuple[float, int]]]) -> Interval:
    """Returns an interval in [0, 1] of the mean over seeds, all tested on the same examples.

    Two variances are added: that of the sample of test examples, which more seeds do not reduce,
    and that of the mean over seeds. The quantile is Student's with the degrees of freedom of Welch
    and Satterthwaite. Where seeds agree these are infinite, and the interval is `mean_interval`.
    Where seeds differ by much more than the examples explain, they are the number of seeds minus 1:
    then two or three seeds leave a wide interval.
    Source: JCGM 100:2008, "Guide to the expression of uncertainty in measurement", annex G.4.

    Args:
        seeds: the `tasks` of `mean_interval` for each seed, in the same order.
    """
    pooled = [
        (float(np.mean([share for share, _ in task])), min(examples for _, examples in task))
        for task in zip(*seeds, strict=True)
    ]
    means = [float(np.mean([share for share, _ in seed])) for seed in seeds]
    mean, z = float(np.mean(means)), float(stats.norm.ppf((1 + LEVEL) / 2))
    below, above = (abs(limit - mean) / z for limit in mean_interval(pooled))
    between = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    freedom = math.inf
    if between:
        whole = math.hypot((below + above) / 2, between)
        freedom = (len(means) - 1) * (whole / between) ** 4
    t = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    low, high = mean - t * math.hypot(below, between), mean + t * math.hypot(above, between)
    return max(0.0, low), min(1.0, high)


def summarise(
    rows: Sequence[Row], by: Mapping[str, Callable[[Row], object]], *, metric: str = "accuracy"
) -> pd.DataFrame:
    """Returns one line a group of trials that differ in their seed only.

    Args:
        rows: result rows; groups stand in the order of their first row.
        by: column name -> function of a row that gives its value. Rows with equal values are a
            group. A group is split where its rows differ in other config keys than `IGNORED` (as
            after a second sweep with other steps), and a column "also" shows these keys.
        metric: a key of "validation" and "test" in a row's metrics.

    Returns:
        The columns of `by`, then "seeds" (number of finished trials), "test examples", "validation
        METRIC" and "test METRIC" (means), "low" and "high" (`seeds_interval`; None for a metric
        that is not a mean over examples), "trainable", "steps" and "selected step" (a number, or
        "50 to 100" where seeds differ), "seconds" (mean), "values" (test METRIC of each seed),
        "note" (`cautions`) and "status" (failures). The last two are left out where no group has
        any. Values are None for a group without a finished trial.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(value(row) for value in by.values()), []).append(row)
    lines = [
        {**dict(zip(by, key, strict=True)), "also": also, **_group(part, metric)}
        for key, group in groups.items()
        for also, part in by_differences(group).items()
    ]
    frame = pd.DataFrame(lines, columns=[*by, "also", *_group([], metric)], dtype=object)
    return without_empty(frame, "also", "note", "status")


def without_empty(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Returns the table without those of the named columns that are empty in every line."""
    empty = [name for name in names if all(_cell(value) == "" for value in table[name])]
    return table.drop(columns=empty)


def by_differences(
    rows: Sequence[Row], *, ignored: Collection[str] = IGNORED
) -> dict[str, list[Row]]:
    """Groups rows by the scientific config keys in which they differ, except `ignored` ones.

    Returns:
        The rows by their values of these keys, such as "train.steps=100"; "" where none differs.
    """
    settings = [scientific(row["config"]) for row in rows]
    defaults = flatten(base_config())
    differing = [
        key
        for key in sorted(set().union(*settings).difference(ignored))
        if len({repr(one.get(key, defaults.get(key))) for one in settings}) > 1
    ]
    parts: dict[str, list[Row]] = {}
    for row, one in zip(rows, settings, strict=True):
        also = ", ".join(f"{key}={one.get(key, defaults.get(key))}" for key in differing)
        parts.setdefault(also, []).append(row)
    return parts


def _group(rows: Sequence[Row], metric: str) -> dict[str, object]:
    """The line of one group."""
    done = [row for row in rows if row["status"] == "done"]
    test, validation = (_scores(done, split, metric) for split in ("test", "validation"))
    seeds = [tasks for scores in test if (tasks := _tasks(scores, metric))]
    has_interval = seeds and metric in MEANS_OF_EXAMPLES
    low, high = seeds_interval(seeds) if has_interval else (None, None)
    return {
        "seeds": len(done),
        "test examples": _span([scores.get("examples") for scores in test]),
        f"validation {metric}": mean([scores[metric] for scores in validation]),
        f"test {metric}": mean([scores[metric] for scores in test]),
        "low": low,
        "high": high,
        "trainable": _span([row["trainable"] for row in done]),
        "steps": _span([row["steps"] for row in done]),
        "selected step": _span([row["metrics"].get("selected_step") for row in done]),
        "seconds": mean([row["seconds"] for row in done]),
        "values": tuple(scores[metric] for scores in test),
        "note": _notes(done),
        "status": _status(rows),
    }


def _scores(rows: Sequence[Row], split: str, metric: str) -> list[dict[str, Any]]:
    """A split's scores in each row that measured the metric there."""
    scores = [row["metrics"].get(split, {}) for row in rows]
    return [found for found in scores if found.get(metric) is not None]


def _tasks(scores: Mapping[str, Any], metric: str) -> list[tuple[float, int]]:
    """The metric and number of examples of each task that has some; [] if one lacks the metric."""
    names = [name.removesuffix("examples") for name in scores if name.endswith("/examples")]
    counts = {name: scores.get(f"{name}examples") for name in names or [""]}
    found = [(scores.get(f"{name}{metric}"), count) for name, count in counts.items() if count]
    known = [(share, count) for share, count in found if share is not None]
    return known if len(known) == len(found) else []


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _span(values: Sequence[int | None]) -> int | str | None:
    """The value if all are equal, else their range as "50 to 100"; None where all are None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    return low if low == high else f"{low:,} to {high:,}"


def _notes(rows: Sequence[Row]) -> str:
    """The cautions of a group's rows, each with the number of its seeds."""
    counts = Counter(caution for row in rows for caution in cautions(row))
    of = f" ({{}} of {len(rows)} seeds)" if len(rows) > 1 else ""
    return "; ".join(caution + of.format(count) for caution, count in counts.items())


def _status(rows: Sequence[Row]) -> str:
    """The number of failed trials and the beginning of the first error; "" where none failed."""
    failed = [row for row in rows if row["status"] != "done"]
    if not failed:
        return ""
    error = textwrap.shorten(failed[0]["error"], 80)
    return f"{len(failed)} of {len(rows)} {failed[0]['status']}: {error}"


def mark_best(table: pd.DataFrame, *, by: str, among: pd.Series) -> pd.DataFrame:
    """Returns the table with a column "chosen" that says "yes" in the line with the largest `by`.

    Args:
        table: as `summarise` returns it.
        by: a column of numbers; of equal ones the first is chosen, None never.
        among: True for the lines that may be chosen.
    """
    candidates = table.loc[among & table[by].notna(), by].astype(float)
    best = candidates.idxmax() if len(candidates) else None
    return table.assign(chosen=["yes" if index == best else "" for index in table.index])


def overview(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line per trial: name, id, the config keys that vary, scores and status."""
    flat = [with_new_names(flatten(row["config"])) for row in rows]
    keys = sorted(set().union(*flat))
    varying = [key for key in keys if len({repr(config.get(key)) for config in flat}) > 1]
    lines = []
    for row, config in zip(rows, flat, strict=True):
        scores = {
            f"{split} {name}": value
            for split, found in row["metrics"].items()
            if isinstance(found, dict)
            for name, value in found.items()
            if isinstance(value, int | float) and not name.endswith(NOT_METRICS)
        }
        lines.append(
            {
                "trial": row["name"],
                "id": row["trial"],
                **{key: config.get(key) for key in varying},
                **scores,
                "selected step": row["metrics"].get("selected_step"),
                "seconds": row["seconds"],
                "status": f"{row['status']}: {row['error']}" if row["error"] else row["status"],
                "note": "; ".join(cautions(row)),
            }
        )
    return without_empty(pd.DataFrame(lines, dtype=object), "selected step", "note")


def subject(rows: Sequence[Row]) -> str:
    """Returns the tasks and models of rows, as "movie_sentiment, smollm2-135m-instruct-q4"."""
    configs = [row["config"] for row in rows]
    tasks = ["+".join(task_names(config)) for config in configs]
    models = [str(config.get("model", {}).get("name", "")) for config in configs]
    return ", ".join(_some(names, kind) for names, kind in ((tasks, "tasks"), (models, "models")))


def _some(names: Sequence[str], kind: str) -> str:
    """Distinct names without their folders or organisations; the number of more than two."""
    found = list(dict.fromkeys(name.rstrip("/").rpartition("/")[2] for name in names))
    return " and ".join(found) if len(found) <= 2 else f"{len(found)} {kind}"


def to_markdown(table: pd.DataFrame, caption: str = "") -> str:
    """Returns a Markdown table with aligned columns, the caption below it."""
    cells = [[str(name) for name in table.columns]]
    cells += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    numeric = [_is_numeric(table[name]) for name in table.columns]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(numeric))]

    def line(row: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (w - 1) + (":" if right else "-") for w, right in zip(widths, numeric, strict=True)
    ]
    body = [line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])]
    return "\n".join(body) + "\n" + (f"\n{caption}\n" if caption else "")


def to_html(table: pd.DataFrame) -> str:
    """Returns an HTML table; cells of numbers have the class "number"."""
    kinds = [' class="number"' if _is_numeric(table[name]) else "" for name in table.columns]

    def line(tag: str, row: Sequence[object]) -> str:
        texts = [html.escape(_cell(value)) for value in row]
        cells = (f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(line("td", row) for row in table.itertuples(index=False))
    head = line("th", [str(name) for name in table.columns])
    return f"<table><thead>{head}</thead>\n<tbody>{body}</tbody></table>"


def to_csv(table: pd.DataFrame) -> str:
    """Returns comma-separated text with a header line."""
    return table.to_csv(index=False, lineterminator="\n")


def to_latex(table: pd.DataFrame, caption: str = "") -> str:
    """Returns a LaTeX table (it needs booktabs), every special character escaped."""
    texts = table.map(_cell)
    aligned = "".join("r" if _is_numeric(table[name]) else "l" for name in table.columns)
    caption = "".join(f"\\{sign}" if sign in "%&#_$" else sign for sign in caption)
    return texts.to_latex(index=False, escape=True, column_format=aligned, caption=caption or None)


def _cell(value: object) -> str:
    """A cell's text: "" for a missing value, three decimals, thousands separated by commas."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        small = value != 0 and abs(value) < 0.01
        return f"{value:.3g}" if small else f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _is_numeric(column: pd.Series) -> bool:
    """Whether a column holds numbers, which are aligned right."""
    return all(_cell(value) == "" or isinstance(value, int | float | np.number) for value in column)
