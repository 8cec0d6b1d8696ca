"""Intervals for few seeds and small test sets, and tables as Markdown, CSV and LaTeX."""

import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from softprompt.config import base_config, flatten, scientific
from softprompt.results import Row

Interval = tuple[float, float]

LEVEL = 0.95

# Keys that trials of one group may differ in: the seed, and what is measured beside the scores.
NO_DIFFERENCE = {"seed", "eval.latency", "eval.text", "eval.text_tokens"}


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Returns Student's t-interval for a mean; infinite for fewer than two values."""
    if len(values) < 2:
        return -math.inf, math.inf
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def wilson_interval(share: float, examples: int, level: float = LEVEL) -> Interval:
    """Returns Wilson's score interval for a share of examples.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = float(stats.norm.ppf((1 + level) / 2))
    scale = 1 + z**2 / examples
    middle = (share + z**2 / (2 * examples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / examples + z**2 / (4 * examples**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(tasks: Sequence[tuple[float, int]], level: float = LEVEL) -> Interval:
    """Returns an interval of the mean of tasks' shares of examples, in which tasks count alike.

    Of one task it is Wilson's; several are combined by the distances of their own limits.
    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures".

    Args:
        tasks: each one's share and its number of examples, at least one.
        level: of confidence.
    """
    shares = np.array([share for share, _ in tasks])
    limits = np.array([wilson_interval(share, examples, level) for share, examples in tasks])
    below, above = np.linalg.norm(limits - shares[:, None], axis=0) / len(tasks)
    return float(shares.mean() - below), float(shares.mean() + above)


def accuracy_interval(
    values: Sequence[float], tasks: Sequence[Sequence[tuple[float, int]]]
) -> Interval:
    """Returns the interval of a mean accuracy, clipped to [0, 1].

    Over seeds (Student's t) where there are several, else over the test examples.

    Args:
        values: one accuracy a seed, at least one.
        tasks: for each seed, what `mean_interval` takes.
    """
    low, high = t_interval(values) if len(values) > 1 else mean_interval(tasks[0])
    return max(0.0, low), min(1.0, high)


def summarise(
    rows: Sequence[Row],
    by: Mapping[str, Callable[[Row], object]],
    *,
    metric: str = "accuracy",
) -> pd.DataFrame:
    """Returns one line a group of trials that differ in their seed only.

    Args:
        rows: result rows; groups stand in the order of their first row.
        by: column name -> what it says of a row; rows that agree in all are a group. Those that
            differ otherwise than in seed or in what else was measured (as after another run of a
            sweep with other steps) are none: each is a line, and a column "also" tells them apart.
        metric: a share of examples that "validation" and "test" of a row's metrics hold.

    Returns:
        The columns of `by`, then "seeds" (trials that are done), "validation METRIC" and
        "test METRIC" (means), "low" and "high" (`accuracy_interval`), "trainable", "steps",
        "seconds" (means), "status" and "values" (test METRIC of each seed). What a group without a
        finished trial lacks is None.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(value(row) for value in by.values()), []).append(row)
    lines: list[dict[str, object]] = []
    for key, group in groups.items():
        for also, part in unlike(group).items():
            told = {"also": also} if also else {}
            lines.append({**dict(zip(by, key, strict=True)), **told, **_group(part, metric)})
    also_there = ["also"] if any("also" in line for line in lines) else []
    frame = pd.DataFrame(lines, columns=[*by, *also_there, *_group([], metric)], dtype=object)
    return frame.fillna({"also": ""}) if also_there else frame


def unlike(rows: Sequence[Row], *, but: Collection[str] = NO_DIFFERENCE) -> dict[str, list[Row]]:
    """Rows by what else they differ in, such as "train.steps=100"; "" where that is nothing.

    Args:
        rows: result rows.
        but: config keys that make no difference.
    """
    settings = [scientific(row["config"]) for row in rows]
    usual = flatten(base_config())
    differing = [
        key
        for key in sorted(set().union(*settings).difference(but))
        if len({repr(one.get(key, usual.get(key))) for one in settings}) > 1
    ]
    parts: dict[str, list[Row]] = {}
    for row, one in zip(rows, settings, strict=True):
        also = ", ".join(f"{key}={one.get(key, usual.get(key))}" for key in differing)
        parts.setdefault(also, []).append(row)
    return parts


def _group(rows: Sequence[Row], metric: str) -> dict[str, object]:
    """What `summarise` says of one group."""
    done = [row for row in rows if row["status"] == "done"]
    test, validation = (_scores(done, split, metric) for split in ("test", "validation"))
    values = tuple(scores[metric] for scores in test)
    low, high = (
        accuracy_interval(values, [_tasks(scores, metric) for scores in test])
        if values
        else (None, None)
    )
    return {
        "seeds": len(done),
        f"validation {metric}": mean([scores[metric] for scores in validation]),
        f"test {metric}": mean(values),
        "low": low,
        "high": high,
        "trainable": done[0]["trainable"] if done else None,
        "steps": done[0]["steps"] if done else None,
        "seconds": mean([row["seconds"] for row in done]),
        "status": _status(rows),
        "values": values,
    }


def _scores(rows: Sequence[Row], split: str, metric: str) -> list[dict[str, Any]]:
    """A split's scores in each row that measured the metric there."""
    scores = [row["metrics"].get(split, {}) for row in rows]
    return [found for found in scores if found.get(metric) is not None]


def _tasks(scores: Mapping[str, Any], metric: str) -> list[tuple[float, int]]:
    """A metric and the number of examples, of each task of a mixture that has some."""
    names = [name.removesuffix("examples") for name in scores if name.endswith("/examples")]
    counts = {name: scores[f"{name}examples"] for name in names or [""]}
    return [(scores[f"{name}{metric}"], count) for name, count in counts.items() if count]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known; None of nothing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _status(rows: Sequence[Row]) -> str:
    """The word "done", or how many failed and the beginning of the first error."""
    failed = [row for row in rows if row["status"] != "done"]
    if not failed:
        return "done"
    error = textwrap.shorten(failed[0]["error"], 80)
    return f"{len(failed)} of {len(rows)} {failed[0]['status']}: {error}"


def mark_best(table: pd.DataFrame, *, by: str, among: pd.Series) -> pd.DataFrame:
    """Returns the table with a column "chosen" that says "yes" in the line with the largest `by`.

    Args:
        table: as `summarise` returns it.
        by: the column to go by; None never wins, and of equals the first does.
        among: True for the lines that may win.
    """
    candidates = table.loc[among & table[by].notna(), by].astype(float)
    best = candidates.idxmax() if len(candidates) else None
    return table.assign(chosen=["yes" if index == best else "" for index in table.index])


def overview(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line a trial: its name and id, the config keys that vary, scores and status."""
    flat = [flatten(row["config"]) for row in rows]
    keys = sorted(set().union(*flat))
    varying = [key for key in keys if len({repr(config.get(key)) for config in flat}) > 1]
    lines = []
    for row, config in zip(rows, flat, strict=True):
        scores = {
            f"{split} {name}": value
            for split, found in row["metrics"].items()
            if isinstance(found, dict)
            for name, value in found.items()
            if isinstance(value, int | float) and not name.endswith("examples")
        }
        status = f"{row['status']}: {row['error']}" if row.get("error") else row["status"]
        lines.append(
            {
                "trial": row.get("name", ""),
                "id": row["trial"],
                **{key: config.get(key) for key in varying},
                **scores,
                "seconds": row.get("seconds"),
                "status": status,
            }
        )
    return pd.DataFrame(lines, dtype=object)


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


def to_csv(table: pd.DataFrame) -> str:
    """Returns comma-separated text with a header line."""
    return table.to_csv(index=False, lineterminator="\n")


def to_latex(table: pd.DataFrame, caption: str = "") -> str:
    """Returns a LaTeX table (it needs booktabs), every special character escaped."""
    texts = table.map(_cell)
    aligned = "".join("r" if _is_numeric(table[name]) else "l" for name in table.columns)
    return texts.to_latex(
        index=False, escape=True, column_format=aligned, caption=_escape(caption) or None
    )


def _escape(text: str) -> str:
    """The caption with LaTeX's special characters escaped."""
    return "".join(f"\\{sign}" if sign in "%&#_$" else sign for sign in text)


def _cell(value: object) -> str:
    """A cell's text: "" for what is missing, three decimals, thousands set off."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        small = value != 0 and abs(value) < 0.01
        return f"{value:.3g}" if small else f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _is_numeric(column: pd.Series) -> bool:
    """Whether a column reads best flush right."""
    return all(_cell(value) == "" or isinstance(value, int | float | np.number) for value in column)
