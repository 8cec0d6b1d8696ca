"""Result rows, one for each trial. Tables and figures are computed only from rows."""

import functools
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from softprompt.config import ConfigDict, to_dict, trial_id, trial_name
from softprompt.console import duration
from softprompt.errors import UserError
from softprompt.files import write_text
from softprompt.source import commit

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

FILE = "result.json"
_PACKAGES = ("softprompt", "jax", "jaxlib", "flax", "optax", "numpy")
_NOT_TRIALS = ("checkpoints", "snapshots", "queue", "code", "programs")
_MEASURED = ("validation", "test", "text", "latency")  # objects in a row's metrics


# Facts about how a trial ran, which are numbers or None in its row.
FACTS = {
    "compile_seconds": "the part of `seconds` that the last process spent on compiling",
    "steps": "optimizer steps taken",
    "flops": "floating-point operations of the training, all steps",
    "peak_share": "share of the devices' peak that the training reached, 0 to 1",
    "input_wait_share": "share of the training's time in which the devices waited for a batch, "
    "0 to 1",
    "peak_memory_bytes": "the largest memory in use on a device",
    "trainable": "number of trained parameters",
    "stored": "number of parameters in the saved delta, without what only training needed",
    "weight_bytes": "bytes of the frozen weights, each counted once over all devices",
    "step_seconds": "median seconds of a training step, without evaluations and compilation",
    "members": "the most trials that ran at a time. They share the devices: step_seconds is the "
    "time in which each takes a step; step_memory_bytes is of all where they are one program",
    "step_memory_bytes": "bytes that a training step needs on a device, with weights and batch, as "
    "the compiler reports them",
    "delta_bytes": "size of the saved delta's file",
    "shared_texts": "texts that occur in two of the task's splits",
}


def make_row(
    config: ConfigDict,
    *,
    status: str,
    seconds: float,
    metrics: Mapping[str, Any] | None = None,
    error: str = "",
    data: Mapping[str, str] | None = None,
    **facts: float | None,
) -> Row:
    """Returns a trial's row.

    Args:
        config: the resolved config.
        status: "done" or "failed".
        seconds: wall time of the trial, including compilation and evaluation.
        metrics: {"validation": {"accuracy": ..., "examples": ...}, "test": {...}, ...}.
        error: one line if the trial failed, else "".
        data: the digest of each split.
        **facts: any of `FACTS`.
    """
    assert facts.keys() <= FACTS.keys(), facts.keys() - FACTS.keys()
    return {
        "trial": trial_id(config),
        "name": trial_name(config),
        "status": status,
        "error": error,
        "config": to_dict(config),
        "commit": commit(),
        "versions": versions(),
        "devices": devices(),
        "data": dict(data or {}),
        "seconds": seconds,
        **{name: facts.get(name) for name in FACTS},
        "metrics": dict(metrics or {}),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a clone that is not installed
            found[package] = "unknown"
    return found


def devices() -> dict[str, Any]:
    """Returns the platform, kind and number of devices, the processes and the host's cores."""
    import jax  # here, since reading rows never needs it

    found = jax.devices()
    return {
        "platform": found[0].platform,
        "kind": found[0].device_kind,
        "count": len(found),
        "processes": jax.process_count(),
        "host_cores": os.cpu_count(),
    }


def write_result(folder: epath.PathLike, row: Row) -> None:
    """Writes a trial's row to its folder, atomically.

    Only process 0 writes. NaN and infinite numbers become null, since JSON has no NaN.
    """
    import jax  # here, since reading rows never needs it

    if jax.process_index() == 0:
        write_text(
            epath.Path(folder) / FILE, json.dumps(_plain(row), indent=2, allow_nan=False) + "\n"
        )


def _plain(value: Any) -> Any:
    """Converts a value to JSON types: array scalars to numbers, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_result(folder: epath.PathLike) -> Row | None:
    """Returns the row of a trial's folder; None if it has none.

    Keys that are missing in the file (older versions wrote fewer) become None, "error" becomes ""
    and "metrics" becomes {}.

    Raises:
        UserError: the file does not hold a row.
    """
    file = epath.Path(folder) / FILE
    if not file.exists():
        return None
    try:
        row = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); delete it to run the trial again") from error
    if not isinstance(row, dict) or not {"trial", "status", "config"} <= row.keys():
        raise UserError(f"{file}: not a result row; it needs the keys trial, status and config")
    row = {"name": row["trial"], "error": "", "seconds": None, **dict.fromkeys(FACTS)} | row
    row["metrics"] = row.get("metrics") or {}
    for name, value in (("config", row["config"]), *_tables(row["metrics"])):
        if not isinstance(value, dict):
            raise UserError(f"{file}: {name} is {value!r}; allowed: a JSON object")
    return row


def _tables(metrics: Any) -> list[tuple[str, Any]]:
    """The metrics and those of its entries that must be JSON objects, with their names."""
    found = [("metrics", metrics)]
    if isinstance(metrics, dict):
        found += [(f"metrics.{part}", metrics[part]) for part in _MEASURED if part in metrics]
    return found


def cautions(row: Row) -> list[str]:
    """Returns short warnings about scores that may mislead; [] for most rows."""
    metrics = row["metrics"]
    found = []
    if metrics.get("selected_step") == 0:
        found.append("step 0 selected: untrained")
    counts = metrics.get("test", {}).items()
    if any(name.split("/")[-1] == "classes_predicted" and n == 1 for name, n in counts):
        found.append("one class predicted")
    if row.get("shared_texts"):
        found.append(f"{row['shared_texts']:,} texts in two splits")
    return found


def outcome(row: Row) -> str:
    """Returns a line about a finished trial: its test score, its time and its `cautions`."""
    test = row["metrics"].get("test", {})
    metric = row["config"].get("eval", {}).get("metric", "accuracy")
    parts = [f"{row['name']}: test {metric} "]
    if test.get(metric) is None:
        parts[0] += "unknown"
    else:
        parts[0] += f"{test[metric]:.3f} on {test.get('examples', 0):,} examples"
    if row["seconds"] is not None:
        parts.append(duration(row["seconds"]))
    return ", ".join([*parts, *cautions(row)])


def is_done(folder: epath.PathLike) -> bool:
    """Returns whether a folder holds the row of a finished trial."""
    row = read_result(folder)
    return row is not None and row["status"] == "done"


def folders_by_id(workdir: epath.PathLike) -> dict[str, epath.Path]:
    """Returns the folders in WORKDIR by the id (see `trial_id`) that ends their name.

    Of folders with equal ids it is the first by name.
    """
    root = epath.Path(workdir)
    folders = sorted(root.iterdir(), reverse=True) if root.is_dir() else []
    return {folder.name.rpartition("-")[2]: folder for folder in folders}


def read_rows(folder: epath.PathLike) -> list[Row]:
    """Returns the rows of all trials in or below a folder, ordered by folder name.

    Raises:
        UserError: the folder does not exist, or a result is unreadable.
    """
    return [row for _, row in read_trials(folder)]


def read_trials(folder: epath.PathLike) -> list[tuple[epath.Path, Row]]:
    """The same with the folder of each trial."""
    root = epath.Path(folder)
    if not root.is_dir():
        raise UserError(f"no folder {os.fspath(root)!r}; give one that a sweep or a trial wrote")
    return list(_trials(root))


def _trials(folder: epath.Path) -> Iterator[tuple[epath.Path, Row]]:
    """A folder and all folders below it that have a row, depth first."""
    row = read_result(folder)
    if row is not None:
        yield folder, row
    for child in sorted(folder.iterdir()):
        if child.is_dir() and child.name not in _NOT_TRIALS and not child.name.startswith("."):
            yield from _trials(child)


def to_frame(rows: Sequence[Row]) -> "pd.DataFrame":
    """Returns a DataFrame with a column for each leaf, such as "config.method.length"."""
    import pandas as pd  # slow to import, and training never needs it

    return pd.json_normalize(list(rows))
