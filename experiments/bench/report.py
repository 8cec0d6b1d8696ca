"""The benchmark's table, figure and claims: pure functions of its rows."""

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.bench.cells import APART, SAVINGS, Cell
from softprompt.analysis.plots import Point, length_plot

Row = Mapping[str, Any]

TOLERANCE = 1e-5  # relative, of losses in float32

CAPTION = (
    "Threads: PEFT's, the better of one and all at P = 20. Seconds: median of a step of 16 "
    "examples over all processes, warm-up left out. Speed: how many times quicker than PEFT in "
    "its quicker dtype. Memory: peak resident GB above the imports, loading and compilation "
    "included (on a GPU: of the device). Share: of the rate that the machine reaches in products "
    "of the step's own shapes, useful operations only. First: seconds of the first step with its "
    "compilation, and with a program from the cache. Factor: what a step without that saving "
    "takes, against one with all; alone: against one that differs in nothing else. Passages are "
    "cut from speeches and labelled in turns: only their length, that of BoolQ's, matters. PEFT "
    "trains all weights in bfloat16 where it computes in it, this library in float32."
)


@dataclasses.dataclass(frozen=True)
class Group:
    """What the processes of one system measured of one cell; numbers are None where none is done.

    Attributes:
        cell: what was trained.
        side: "ours" or "peft".
        dtype: that it ran in, not "auto".
        off: the saving that was switched off.
        rows: one a process, failed ones too.
    """

    cell: Cell
    side: str
    dtype: str
    off: str
    rows: tuple[Row, ...]

    @property
    def done(self) -> list[Row]:
        """The rows that have numbers."""
        return [row for row in self.rows if row["status"] == "done"]

    @property
    def batches(self) -> list[float]:
        """Seconds of every timed step."""
        return list(itertools.chain(*(row["seconds"] for row in self.done)))

    @property
    def seconds(self) -> float | None:
        """Their median."""
        return statistics.median(self.batches) if self.done else None

    @property
    def memory(self) -> float | None:
        """The largest peak in GB."""
        return max(row["memory"] for row in self.done) / 1e9 if self.done else None

    @property
    def share(self) -> float | None:
        """Of the machine's own rate."""
        rates = [row["rate"] for row in self.done if row.get("rate")]
        if not rates or self.seconds is None:
            return None
        return float(self.done[0]["flops"]) / self.seconds / statistics.median(rates)

    def first(self, cached: bool) -> float | None:
        """Median seconds of the first step, with or without a compiled program from the cache."""
        found = [row["first"] for row in self.done if row.get("cached", False) == cached]
        return statistics.median(found) if found else None

    @property
    def status(self) -> str:
        """The word "done", or what became of those that are not."""
        return ", ".join(sorted({row["status"] for row in self.rows}))


def groups(rows: Sequence[Row]) -> list[Group]:
    """The timed rows by what they measured, in the order of the first."""
    found: dict[tuple[Cell, str, str, str], list[Row]] = {}
    done = [row for row in rows if "actual_dtype" in row]
    chosen: dict[str, str] = {row["dtype"]: row["actual_dtype"] for row in done}
    for row in rows:
        if row["purpose"] == "time":
            cell = Cell(row["model"], row["text"], row["method"], row["length"])
            asked: str = row["dtype"]  # all that a failed row has
            dtype = chosen.get(asked, asked)
            found.setdefault((cell, row["side"], dtype, row["off"]), []).append(row)
    return [Group(*key, rows=tuple(some)) for key, some in found.items()]


def quickest(found: Sequence[Group], cell: Cell, side: str, dtype: str = "") -> Group | None:
    """A side's quickest form of a cell with all savings; of one dtype, or of any."""
    mine = [
        group
        for group in found
        if (group.cell, group.side, group.off) == (cell, side, "")
        and dtype in ("", group.dtype)
        and group.seconds is not None
    ]
    return min(mine, key=lambda group: group.seconds or 0.0, default=None)


def as_peft(cell: Cell) -> Cell:
    """What PEFT trains in its place: a T5's prompt is always part of the input there."""
    return dataclasses.replace(cell, method="prompt") if cell.method == APART else cell


def ratio(over: float | None, under: float | None) -> float | None:
    """Their quotient, None where either is not there."""
    return None if over is None or under is None else over / under


def seconds_of(group: Group | None) -> float | None:
    """Of a group, if there is one."""
    return group.seconds if group else None


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line a cell and system."""
    found = groups(rows)
    return pd.DataFrame([_line(group, found) for group in found], dtype=object)


def _line(group: Group, found: Sequence[Group]) -> dict[str, object]:
    peft = quickest(found, as_peft(group.cell), "peft")
    same = {g.off: g for g in found if g.side == "ours" and _alike(g, group)}
    less = same.get("packing" if group.off == "context" else "")  # differs in `off` alone
    step, done = group.seconds, group.done
    off = group.side == "ours" and group.off != ""
    name = "PEFT" if group.side == "peft" else "softprompt"
    return {
        "model": group.cell.model,
        "text": group.cell.text,
        "method": group.cell.method,
        "P": group.cell.length or None,
        "system": f"{name} without {group.off}" if off else name,
        "dtype": group.dtype,
        "threads": done[0].get("threads") if done else None,
        "batches": len(group.batches),
        "seconds": step,
        "examples/s": None if step is None else 16 / step,
        "speed": ratio(seconds_of(peft), step) if group.side == "ours" else None,
        "memory": group.memory,
        "share": group.share,
        "first": group.first(cached=False),
        "first, cached": group.first(cached=True),
        "factor": ratio(step, seconds_of(same.get(""))) if off else None,
        "alone": ratio(step, seconds_of(less)) if off else None,
        "first loss": done[0]["losses"][0] if done else None,
        "status": group.status,
    }


def _alike(one: Group, other: Group) -> bool:
    return (one.cell, one.dtype) == (other.cell, other.dtype)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the speed against PEFT's quicker dtype by prompt length; bars span all pairs."""
    found = groups(rows)
    lines: dict[str, list[Point]] = {}
    for cell in dict.fromkeys(group.cell for group in found if group.cell.length):
        ours, peft = quickest(found, cell, "ours"), quickest(found, as_peft(cell), "peft")
        if ours is None or peft is None:
            continue
        each = [
            statistics.median(theirs["seconds"]) / statistics.median(mine["seconds"])
            for mine, theirs in itertools.product(ours.done, peft.done)
        ]
        mean = (peft.seconds or 0.0) / (ours.seconds or 1.0)
        point = Point(cell.length, mean, min(each), max(each), tuple(each))
        lines.setdefault(f"{cell.method}, {cell.model}, {cell.text}", []).append(point)
    return length_plot(
        lines,
        {"PEFT": Point(0, 1.0, 1.0, 1.0, (1.0,))},
        xlabel="Length (vectors)",
        ylabel="Examples a second, PEFT's = 1",
        title="A training step against PEFT's in its quicker dtype",
    )


def claims(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns a line a claim: the target, what was measured, and whether it is met.

    None of the targets is checked by anything else; losses with a saving and without it are.
    """
    found = groups(rows)
    lines = [*_speeds(found), *_sizes(found), *_losses(rows)]
    return pd.DataFrame(lines, columns=["claim", "target", "measured", "verdict"], dtype=object)


def _speeds(found: Sequence[Group]) -> list[dict[str, object]]:
    asked = (
        ("smollm2", "prompt", 20, "", 2.3),
        ("smollm2", "prompt", 100, "", 6.0),
        ("smollm2", "prompt", 500, "", 11.0),
        ("smollm2", "prompt", 100, "float32", 11.0),
        ("gemma3", "prompt", 100, "", 7.0),
        *(("t5-small", "prompt", length, "", 1.5) for length in (20, 100)),
        *(("t5-small", APART, length, "", 3.0) for length in (20, 100)),
    )
    lines = []
    for model, method, length, dtype, target in asked:
        cell = Cell(model, "movie", method, length)
        ours, peft = quickest(found, cell, "ours"), quickest(found, as_peft(cell), "peft", dtype)
        speed = ratio(seconds_of(peft), seconds_of(ours))
        name = f"{model}, {method}, P = {length}" if method == APART else f"{model}, P = {length}"
        against = f"PEFT in {dtype or 'its quicker dtype'}"
        lines.append(_claim(f"{name}: speed against {against}", target, speed))
    return lines


def _sizes(found: Sequence[Group]) -> list[dict[str, object]]:
    """Memory and share at P = 100."""
    cell = Cell("smollm2", "movie", "prompt", 100)
    ours = quickest(found, cell, "ours")
    peft = quickest(found, cell, "peft", ours.dtype) if ours else None
    memory = ratio(ours.memory if ours else None, peft.memory if peft else None)
    name = "smollm2, P = 100: peak memory against PEFT in the same dtype"
    share = ours.share if ours else None
    return [
        _claim(name, 0.5, memory, most=True),
        _claim("smollm2, P = 100: share of the products' rate", 0.65, share),
    ]


def _losses(rows: Sequence[Row]) -> list[dict[str, object]]:
    """How far the first losses without a saving are from those with all."""
    done = [row for row in rows if row["purpose"] == "losses" and row["status"] == "done"]
    lines = []
    for model in dict.fromkeys(row["model"] for row in done):
        losses = {row["off"]: row["losses"] for row in done if row["model"] == model}
        for off in SAVINGS:
            apart = losses_apart(losses[""], losses[off]) if {"", off} <= losses.keys() else None
            name = f"{model}: losses without {off}, relative difference"
            lines.append(_claim(name, TOLERANCE, apart, most=True))
    return lines


def losses_apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True))


def _claim(
    name: str, target: float, measured: float | None, *, most: bool = False
) -> dict[str, object]:
    """A line; `most`: the target is the most that it may be, else the least."""
    if measured is None:
        verdict = "not measured"
    else:
        verdict = "met" if (measured <= target if most else measured >= target) else "missed"
    shown = f"{'<=' if most else '>='} {target:g}"
    return {"claim": name, "target": shown, "measured": measured, "verdict": verdict}
