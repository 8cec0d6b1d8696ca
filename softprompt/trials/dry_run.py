"""What a sweep would cost: `softprompt sweep --dry-run`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from softprompt.config import ConfigDict, method_settings, trial_id, trial_name, weights_key
from softprompt.console import duration
from softprompt.results import is_done
from softprompt.trials.forecast import Estimate
from softprompt.trials.sweep import reason, trial_folders

if TYPE_CHECKING:
    import pandas as pd


def dry_run(
    trials: Sequence[ConfigDict], workdir: epath.PathLike, estimate: Estimate
) -> "pd.DataFrame":
    """Returns the estimated cost of a sweep: a line for each trial, and the total.

    "state" is "done", "to run", or "fails: ..." if the estimate raises an error. `estimate` returns
    "trainable", "flops", "memory_bytes" and "seconds" of a config.
    """
    import pandas as pd  # slow to import

    rows: dict[int, dict[str, Any]] = {}
    flops = seconds = 0.0
    folders = trial_folders(workdir, trials)
    for index in sorted(range(len(trials)), key=lambda n: weights_key(trials[n])):
        config = trials[index]
        row = rows[index] = {
            "trial": trial_name(config),
            "id": trial_id(config),
            "state": "done" if is_done(folders[index]) else "to run",
            "steps": config.train.steps if method_settings(config).trains else 0,
        }
        try:
            cost = estimate(config)
        except Exception as error:
            row["state"] = f"fails: {reason(error)}"
            continue
        if row["state"] == "to run":
            flops, seconds = flops + cost["flops"], seconds + cost["seconds"]
        row |= {
            "trainable": int(cost["trainable"]),
            "FLOPs": f"{cost['flops']:.3g}",
            "memory": f"{cost['memory_bytes'] / 2**30:.2f} GiB",
            "time": duration(cost["seconds"]),
        }
    left = sum(row["state"] == "to run" for row in rows.values())
    total = {"trial": f"{left} to run", "FLOPs": f"{flops:.3g}", "time": duration(seconds)}
    ordered = [rows[index] for index in range(len(trials))]
    return pd.DataFrame([*ordered, total], dtype=object).fillna("")
