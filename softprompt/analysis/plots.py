"""The style of all figures, scores against a length or by category, and points with names."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

# Okabe and Ito's colours, which colour-blind readers can distinguish, each with a marker for grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREYS = ("#555555", "#999999")

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Point:
    """A mean over seeds at `x`, with the ends of its interval and the value of each seed."""

    x: float
    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def length_plot(
    lines: Mapping[str, Sequence[Point]],
    bands: Mapping[str, Point],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Figure:
    """Draws scores against prompt length: a line for each series, a band for each baseline.

    Points are drawn with their intervals, and with small marks for seeds. An empty series is not
    drawn but keeps its colour. The x of a baseline's point is not used.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0))
        axes = figure.subplots()
        labels = _draw_bands(axes, bands)
        lengths = sorted({point.x for points in lines.values() for point in points})
        for number, (name, points) in enumerate(lines.items()):
            if not points:
                continue
            again = number // 6  # a repeated colour has another marker, and a dotted line
            colour, marker = COLOURS[number % 6], MARKERS[(number + again) % 6]
            dash = ":" if again else "-"
            style = {"color": colour, "marker": marker, "linestyle": dash}
            _draw_line(axes, points, style, shift=1.0 + 0.03 * (number - 1))
            last = max(points, key=lambda point: point.x)
            labels.append((last.mean, name, colour))
        _scale(axes, lengths)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, loc="left", fontsize=10)
        _label_right(axes, labels)
    return figure


def category_plot(
    series: Mapping[str, Mapping[str, Point]],
    bands: Mapping[str, Point],
    *,
    ylabel: str,
    title: str = "",
) -> Figure:
    """Draws scores by category, with a dot and its interval for each series, side by side.

    `series` maps a series and a category to a point, whose x is not used, `bands` a baseline to the
    point of a horizontal band. Categories are in the order of their first appearance. Small marks
    are seeds.
    """
    categories = list(dict.fromkeys(name for points in series.values() for name in points))
    width = 0.6 / max(1, len(series))  # of a series; categories are 1 apart
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0))
        axes = figure.subplots()
        labels = _draw_bands(axes, bands)
        for number, (name, points) in enumerate(series.items()):
            shift = width * (number - (len(series) - 1) / 2)
            shifted = [
                dataclasses.replace(point, x=categories.index(category) + shift)
                for category, point in points.items()
            ]
            style = {"color": COLOURS[number % 6], "marker": MARKERS[number % 6]}
            _draw_line(axes, shifted, {**style, "linestyle": "none", "label": name})
        axes.set_xticks(range(len(categories)), categories, rotation=30, ha="right")
        axes.set(ylabel=ylabel)
        axes.set_title(title, loc="left", fontsize=10)
        _label_right(axes, labels)
        if series:
            axes.legend(frameon=False)
    return figure


def named_points(
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Figure:
    """Draws points (x, y, name) with their names beside them, joined in the order of x."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0))
        axes = figure.subplots()
        for number, (name, points) in enumerate(series.items()):
            colour, marker = COLOURS[number % 6], MARKERS[number % 6]
            ordered = sorted(points)
            xs, ys = [x for x, _, _ in ordered], [y for _, y, _ in ordered]
            axes.plot(xs, ys, color=colour, marker=marker, markersize=6, label=name)
            for x, y, label in ordered:
                axes.annotate(label, (x, y), (4, 6), textcoords="offset points", color=colour)
        axes.set_xscale("log")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.12, y=0.15)
        if series:
            axes.legend(frameon=False)
    return figure


def _draw_bands(axes: Axes, bands: Mapping[str, Point]) -> list[tuple[float, str, str]]:
    """Draws a horizontal band for each baseline; returns their heights, names and colours."""
    labels = []
    for (name, point), colour in zip(bands.items(), itertools.cycle(GREYS)):
        axes.axhspan(point.low, point.high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(point.mean, color=colour, linestyle="--", linewidth=1)
        labels.append((point.mean, name, colour))
    return labels


def _draw_line(
    axes: Axes, points: Sequence[Point], style: Mapping[str, Any], *, shift: float = 1.0
) -> None:
    """Draws a series; `shift` multiplies x, so that intervals at one length do not overlap."""
    ordered = sorted(points, key=lambda point: point.x)
    xs, means = [point.x * shift for point in ordered], [point.mean for point in ordered]
    below = [max(0.0, point.mean - point.low) for point in ordered]  # never -0 by rounding
    above = [max(0.0, point.high - point.mean) for point in ordered]
    axes.errorbar(xs, means, yerr=[below, above], markersize=6, capsize=3, **style)
    for x, point in zip(xs, ordered, strict=True):
        if len(point.values) > 1:
            some = [x] * len(point.values)
            axes.plot(some, point.values, ".", color=style["color"], alpha=0.5, markersize=5)


def _scale(axes: Axes, lengths: Sequence[float]) -> None:
    """Makes the x axis logarithmic, with the lengths as its ticks."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)  # sizes that are a factor of two apart do not touch
    if lengths:
        axes.set_xticks(list(lengths), [short(length) for length in lengths])
        axes.set_xlim(min(lengths) / 1.3, max(lengths) * 1.3)


def short(number: float) -> str:
    """A number for an axis: 20, 0.726M, 135M."""
    return f"{number / 1e6:.3g}M" if number >= 1e5 else f"{number:g}"


def _label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes names beside the right edge at their heights, without overlap."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    ordered = sorted(labels)
    heights = separate([height for height, _, _ in ordered], gap)
    for height, (_, name, colour) in zip(heights, ordered, strict=True):
        axes.annotate(
            name,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def separate(heights: Sequence[float], gap: float) -> list[float]:
    """Returns sorted heights at least `gap` apart; crowded ones move about their mean."""
    groups: list[list[float]] = []
    for height in sorted(heights):
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, gap) + gap * n for group in groups for n in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)
