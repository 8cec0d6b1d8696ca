"""What a sweep would cost: `softprompt sweep --dry-run`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from softprompt.config import ConfigDict, method_settings, trial_id, trial_name, weights_key
from softprompt.console import duration
from softprompt.results import Row, read_result
from softprompt.trials.engine.plan import program_group
from softprompt.trials.forecast import Estimate
from softprompt.trials.sweep import reason, trial_folders

if TYPE_CHECKING:
    import pandas as pd

Costs = Mapping[int, Mapping[str, float]]


def sweep_cost(
    trials: Sequence[ConfigDict],
    workdir: epath.PathLike,
    estimate: Estimate,
    *,
    here: str,
    target: str,
) -> tuple["pd.DataFrame", str]:
    """Estimates the cost of a sweep.

    Args:
        trials: resolved configs.
        workdir: has the folders of trials that are done.
        estimate: returns "trainable", "flops", "memory_bytes" and "seconds" of a config.
        here: the backend whose seconds these are: "cpu", "gpu" or "tpu".
        target: the backend that the sweep is for. If trials have finished there, their seconds
            correct the estimates: those of the same program if there are some, else all of them.

    Returns:
        A line for each trial, and the total. "state" is "done", "to run", or "fails: ..." if the
        estimate raises an error. And a sentence on where the times come from.
    """
    found = [read_result(folder) for folder in trial_folders(workdir, trials)]
    done = {n: row for n, row in enumerate(found) if row is not None and row["status"] == "done"}
    costs: dict[int, Mapping[str, float]] = {}
    fails: dict[int, str] = {}
    for index in sorted(range(len(trials)), key=lambda n: weights_key(trials[n])):
        try:
            costs[index] = estimate(trials[index])
        except Exception as error:
            fails[index] = f"fails: {reason(error)}"
    expected = {index: cost["seconds"] for index, cost in costs.items()}
    there = {n: row for n, row in done.items() if row["devices"]["platform"] == target}
    measured = {index: _seconds(row) for index, row in there.items() if index in costs}
    groups = {n: program_group(trials[n]) for n in costs}
    alike = {n: [m for m in measured if groups[m] == groups[n]] or list(measured) for n in costs}
    seconds = {n: expected[n] * _ratio(expected, measured, alike[n]) for n in costs}
    states = [fails.get(n) or ("done" if n in done else "to run") for n in range(len(trials))]
    return _table(trials, states, costs, seconds), _source(expected, measured, here, target)


def _seconds(row: Row) -> float:
    """A trial's share of the devices' time, without compilation."""
    alone: float = (row["seconds"] or 0.0) - (row["compile_seconds"] or 0.0)
    return alone / (row["members"] or 1)


def _ratio(
    expected: Mapping[int, float], measured: Mapping[int, float], trials: Sequence[int]
) -> float:
    """The measured seconds of some trials over the estimated ones; 1 without trials."""
    work = sum(expected[n] for n in trials)
    return sum(measured[n] for n in trials) / max(work, 1e-9) if trials else 1.0


def _source(
    expected: Mapping[int, float], measured: Mapping[int, float], here: str, target: str
) -> str:
    """Says where the times come from."""
    if measured:
        ratio = _ratio(expected, measured, list(measured))
        trials = f"{len(measured)} finished trial{'s' if len(measured) > 1 else ''}"
        return f"Times are estimates, corrected by {trials} on {target}: {ratio:.2f} times as long."
    note = f"Times are estimates for this machine's {here}, without compilation"
    other = f"; a finished trial on {target} corrects them" if target != here else ""
    return f"{note}{other}."


def _table(
    trials: Sequence[ConfigDict], states: Sequence[str], costs: Costs, seconds: Mapping[int, float]
) -> "pd.DataFrame":
    """A line for each trial, and the total of those that are to run."""
    import pandas as pd  # slow to import

    rows: list[dict[str, Any]] = []
    for index, (config, state) in enumerate(zip(trials, states, strict=True)):
        steps = config.train.steps if method_settings(config).trains else 0
        row = {"trial": trial_name(config), "id": trial_id(config), "state": state, "steps": steps}
        if cost := costs.get(index):
            row |= {
                "trainable": int(cost["trainable"]),
                "FLOPs": f"{cost['flops']:.3g}",
                "memory": f"{cost['memory_bytes'] / 2**30:.2f} GiB",
                "time": duration(seconds[index]),
            }
        rows.append(row)
    left = [index for index, state in enumerate(states) if state == "to run"]
    total = {
        "trial": f"{len(left)} to run",
        "FLOPs": f"{sum(costs[n]['flops'] for n in left):.3g}",
        "time": duration(sum(seconds[n] for n in left)),
    }
    return pd.DataFrame([*rows, total], dtype=object).fillna("")
