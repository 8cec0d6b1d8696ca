"""The state of a sweep, as text and as a page: one listing, and the workers' last beats."""

import html
import json
import time
from collections.abc import Sequence
from typing import Any

from softprompt.console import duration
from softprompt.trials.engine.claims import QUEUE, View
from softprompt.trials.engine.plan import Plan, read_plan
from softprompt.trials.engine.schedule import count
from softprompt.trials.engine.store import Store

LATE = 90.0  # seconds after which a beat is called late; only by the clocks, which may differ
COLUMNS = ("WORKER", "DEVICES", "STATE", "DONE", "FAILED", "CHIP-HOURS", "NOW")

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; }
td:not(:last-child), th { white-space: nowrap; vertical-align: top; }
.bar { display: flex; height: 1rem; border-radius: .3rem; overflow: hidden; }
.key span { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem; }
.key span:first-child { margin-left: 0; }
.done { background: #2a7; } .failed { background: #c43; } .claimed { background: #48c; }
.waiting { background: #8883; }
"""


def read_status(store: Store) -> tuple[Plan, View, list[dict[str, Any]]]:
    """Returns the plan of a sweep, its state, and the last beat of each worker."""
    plan, view = read_plan(store), View(store.list(QUEUE))
    beats = [store.read(f"{QUEUE}/beats/{worker}") for worker in sorted(view.beats)]
    return plan, view, [json.loads(beat) for beat in beats if beat]


def summary(
    plan: Plan, view: View, beats: Sequence[dict[str, Any]], price: float | None
) -> list[str]:
    """Returns lines about the trials, and about the time of the devices.

    Args:
        plan: see `read_status`.
        view: its state.
        beats: of its workers.
        price: dollars of a chip-hour; None leaves dollars out.
    """
    counts = count(plan.jobs, view)
    said = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    hours = sum(beat.get("chip_seconds", 0.0) for beat in beats) / 3600
    lost = sum(beat.get("chip_seconds_lost", 0.0) for beat in beats) / 3600
    lines = [
        f"{plan.experiment} ({plan.subset}): {len(plan.jobs)} trials: {said}",
        f"{hours:.2f} chip-hours used, {lost:.2f} of them lost",
    ]
    ended = sum(beat.get("done", 0) + beat.get("failed", 0) for beat in beats)
    left = counts["claimed"] + counts["waiting"]
    if left and ended:
        rest = hours / ended * left
        lines.append(f"estimate: {rest:.2f} chip-hours left, from the {ended} trials that ended")
    if price is not None:
        lines[1] += f"; {hours * price:.2f} dollars at {price:g} a chip-hour"
    if view.stop:
        lines.append("stopped: no worker starts; softprompt stop --undo lets them")
    return lines


def table(beats: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns a line of `COLUMNS` for each worker; those that left come last."""
    rows: list[tuple[str, ...]] = []
    for beat in sorted(beats, key=lambda beat: bool(beat.get("left"))):
        stages = [f"{name} {text}".strip() for name, text in beat.get("stages", {}).items()]
        rows.append(
            (
                beat["worker"],
                beat.get("machine", "").partition(": ")[2],
                _state(beat),
                str(beat.get("done", 0)),
                str(beat.get("failed", 0)),
                f"{beat.get('chip_seconds', 0.0) / 3600:.2f}",
                "; ".join(stages),
            )
        )
    return rows


def _state(beat: dict[str, Any]) -> str:
    """What a worker does, by its last beat."""
    if beat.get("problem"):
        return str(beat["problem"])
    if beat.get("left"):
        return "left"
    age = time.time() - beat["time"]
    if age > LATE:
        return f"no beat for {duration(age)}"
    return "works" if beat.get("held") else "waits"


def page(
    plan: Plan,
    view: View,
    beats: Sequence[dict[str, Any]],
    price: float | None,
    *,
    refresh: int = 0,
) -> str:
    """Returns an HTML page, which loads nothing; it reloads itself every `refresh` seconds."""
    counts = count(plan.jobs, view)
    lines = "".join(f"<p>{html.escape(one)}</p>" for one in summary(plan, view, beats, price))
    parts = "".join(
        f'<div class="{state}" style="flex: {number}" title="{number} {state}"></div>'
        for state, number in counts.items()
    )
    key = "".join(f'<span class="{state}"></span>{state}' for state in counts)
    head = "".join(f"<th>{name.lower()}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>"
        for row in table(beats)
    )
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{again}'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(plan.experiment)}</title><style>{STYLE}</style>"
        f'<h1>{html.escape(plan.experiment)}</h1>{lines}<div class="bar">{parts}</div>'
        f'<p class="key">{key}</p>'
        f'<h2>Workers</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div></html>\n'
    )


def _cell(text: str) -> str:
    """A cell of the page; what several trials do stands in several lines."""
    return "<br>".join(map(html.escape, text.split("; ")))
