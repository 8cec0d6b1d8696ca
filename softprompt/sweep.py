"""Sweeps: configs run one after another, finished ones skipped, then a table and a figure.

An experiment is a Python file in `experiments/` with `CAPTION`, `sweep(subset)`, `table(rows)` and
`figure(rows)`.
"""

import functools
import io
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from etils import epath

from softprompt.config import (
    ConfigDict,
    flatten,
    resolve,
    set_key,
    trial_id,
    trial_name,
    validate,
)
from softprompt.config_checks import reads
from softprompt.config_files import find_file, list_modules, load_module
from softprompt.errors import UserError, unknown
from softprompt.progress import Progress, duration
from softprompt.results import Row, is_done, make_row, write_bytes, write_result, write_text
from softprompt.schema import UNTRAINED

if TYPE_CHECKING:
    import pandas as pd

    from softprompt.training.together import Together

RunTrial = Callable[[ConfigDict, epath.Path], Row]
Estimate = Callable[[ConfigDict], Mapping[str, float]]

_PARTS = ("CAPTION", "sweep", "table", "figure")


def load_experiment(name: str) -> ModuleType:
    """Returns an experiment's module.

    Args:
        name: as in experiments/NAME.py, of the working directory or else the repository; or a path.

    Raises:
        UserError: there is no such file (the known ones are listed), or it is no experiment.
    """
    file = find_file(name if name.endswith(".py") else f"experiments/{name}.py")
    if file is None:
        raise unknown("experiment", name, [Path(path).stem for path in list_modules("experiments")])
    try:
        module = load_module(file)
    except Exception as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}") from error
    missing = [part for part in _PARTS if not hasattr(module, part)]
    if missing:
        raise UserError(f"{file}: no experiment, it lacks {', '.join(missing)}")
    return module


def make_trials(
    experiment: ModuleType, subset: str = "full", overrides: Sequence[tuple[str, str]] = ()
) -> list[ConfigDict]:
    """Returns an experiment's resolved configs, overridden and validated.

    A key that is some methods' or optimizers' own is overridden in the trials that read it.

    Raises:
        UserError: a wrong subset, key or value, a key that no trial reads, or two configs that are
            the same trial.
    """
    configs = list(experiment.sweep(subset))
    for key, value in overrides:
        readers = [config for config in configs if reads(flatten(config), key)]
        for config in readers or configs:
            set_key(config, key, value)
    for config in configs:
        validate(config)
    trials = [resolve(config) for config in configs]
    seen: dict[str, int] = {}
    for number, config in enumerate(trials, 1):
        first = seen.setdefault(trial_id(config), number)
        if first != number:
            raise UserError(
                f"trials {first} and {number} of the sweep are the same, {trial_name(config)} "
                f"({trial_id(config)}); a sweep's trials must differ"
            )
    return trials


def parse_shard(text: str) -> tuple[int, int]:
    """Reads "2/4" as the second of four parts.

    Raises:
        UserError: not of the form i/n with 1 <= i <= n.
    """
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard is {text!r}; allowed: i/n with i from 1 to n, such as 1/4")
    return int(part), int(parts)


def take_shard(trials: Sequence[ConfigDict], shard: tuple[int, int]) -> list[ConfigDict]:
    """Returns every n-th trial from the i-th on, counted from 1: parts that cost about the same."""
    part, parts = shard
    return list(trials[part - 1 :: parts])


def trial_folder(workdir: epath.PathLike, config: ConfigDict) -> epath.Path:
    """Returns WORKDIR/NAME-ID; one that ends in the id is the trial's, whatever its name says."""
    root = epath.Path(workdir)
    identity = trial_id(config)
    if root.is_dir():
        for child in sorted(root.iterdir()):
            if child.name.endswith(f"-{identity}"):
                return child
    return root / f"{trial_name(config)}-{identity}"


def run_sweep(
    trials: Sequence[ConfigDict],
    workdir: epath.PathLike,
    run_trial: RunTrial,
    *,
    progress: Progress,
    estimate: Estimate | None = None,
    together: "Together | None" = None,
) -> list[Row]:
    """Runs the trials that are not done, one after another, or some of them together.

    A trial that fails becomes a row with its error and the sweep goes on; a rerun tries it again.
    An interruption (KeyboardInterrupt, or SystemExit(75) after SIGTERM) passes through.

    Args:
        trials: resolved configs, no two the same trial.
        workdir: where the trials' folders are.
        run_trial: runs one config in its folder, writes its result and returns it.
        progress: where it says how far it is.
        estimate: gives the "seconds" expected of a config, for the time left.
        together: groups trials and runs a group's members side by side.

    Returns:
        The rows that failed.
    """
    folders = [trial_folder(workdir, config) for config in trials]
    todo = [index for index, folder in enumerate(folders) if not is_done(folder)]
    finished = len(trials) - len(todo)
    if finished:
        progress.say(f"{finished} of {len(trials)} trials are done already")
    weights = {index: _seconds(trials[index], estimate) for index in todo}
    jobs = {index: (trials[index], folders[index]) for index in todo}
    groups: Iterable[tuple[list[int], int]] = [([place], 1) for place in range(len(todo))]
    if together is not None:
        groups = together.plan([trials[index] for index in todo])
    failed: list[Row] = []
    spent = paid = 0.0
    for places, width in groups:
        members = {index: jobs[index] for index in (todo[place] for place in places)}
        rest = sum(weights.values())
        left = rest * spent / paid if paid else (rest if estimate else None)
        name = trial_name(trials[next(iter(members))])
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        progress.trial(name + more, len(trials) - len(weights), len(trials), left)
        began = time.monotonic()
        for index, row in _run_group(members, width, run_trial, progress, together):
            seconds, began = time.monotonic() - began, time.monotonic()
            weight = weights.pop(index)
            if row["status"] == "done":
                spent, paid = spent + seconds, paid + weight
            else:
                failed.append(row)
    progress.trial("", len(trials), len(trials), 0.0)
    return failed


def _run_group(
    members: Mapping[int, tuple[ConfigDict, epath.Path]],
    width: int,
    run_trial: RunTrial,
    progress: Progress,
    together: "Together | None",
) -> Iterator[tuple[int, Row]]:
    """A group's trials by their index, in the order in which they end."""
    if together is None or width == 1:
        for index, job in members.items():
            yield index, _run_one(*job, run_trial, progress)
        return
    indices, run = list(members), functools.partial(_run_one, progress=progress)
    for place, row in together.run(list(members.values()), width, run):
        yield indices[place], row


def _seconds(config: ConfigDict, estimate: Estimate | None) -> float:
    """The seconds a trial should take; 0 where that fails, for then the trial will, and say why."""
    try:
        return estimate(config)["seconds"] if estimate else 1.0
    except Exception:
        return 0.0


def _run_one(
    config: ConfigDict, folder: epath.Path, run_trial: RunTrial, progress: Progress
) -> Row:
    """One trial's row, written as a failed one where it fails."""
    began = time.monotonic()
    try:
        return run_trial(config, folder)
    except Exception as error:
        row = record_failure(config, folder, error, time.monotonic() - began)
        progress.say(f"trial {row['name']} failed: {row['error']} (in {folder})")
        return row


def record_failure(
    config: ConfigDict, folder: epath.PathLike, error: Exception, seconds: float
) -> Row:
    """Writes and returns a failed trial's row, and the traceback beside it unless a UserError.

    Of several processes the first writes.
    """
    import jax  # here, since what a sweep is made of needs none of it

    reason = " ".join(str(error).split())
    if not isinstance(error, UserError):
        reason = f"{type(error).__name__}: {reason}"
        if jax.process_index() == 0:
            text = "".join(traceback.format_exception(error))
            write_text(epath.Path(folder) / "traceback.txt", text)
    row = make_row(config, status="failed", error=reason, seconds=seconds)
    write_result(folder, row)
    return row


def dry_run(
    trials: Sequence[ConfigDict], workdir: epath.PathLike, estimate: Estimate
) -> "pd.DataFrame":
    """Returns what a sweep would cost, a row a trial and a last row with the totals.

    Args:
        trials: resolved configs.
        workdir: where finished trials are looked for.
        estimate: gives "trainable", "flops", "memory_bytes" and "seconds" of a config.
    """
    import pandas as pd  # slow to import

    rows: list[dict[str, Any]] = []
    flops = seconds = 0.0
    for config in trials:
        cost = estimate(config)
        done = is_done(trial_folder(workdir, config))
        if not done:
            flops, seconds = flops + cost["flops"], seconds + cost["seconds"]
        rows.append(
            {
                "trial": trial_name(config),
                "id": trial_id(config),
                "state": "done" if done else "to run",
                "steps": 0 if config.method.name in UNTRAINED else config.train.steps,
                "trainable": int(cost["trainable"]),
                "FLOPs": f"{cost['flops']:.3g}",
                "memory": f"{cost['memory_bytes'] / 2**30:.2f} GiB",
                "time": duration(cost["seconds"]),
            }
        )
    left = sum(row["state"] == "to run" for row in rows)
    total = {"trial": f"{left} to run", "FLOPs": f"{flops:.3g}", "time": duration(seconds)}
    return pd.DataFrame([*rows, total], dtype=object).fillna("")


def write_outputs(experiment: ModuleType, rows: Sequence[Row], folder: epath.PathLike) -> None:
    """Writes table.md, .csv and .tex and figure.png and .pdf, each whole or not at all."""
    from softprompt.analysis import tables  # pandas is slow to import

    root = epath.Path(folder)
    table = experiment.table(rows)
    write_text(root / "table.md", tables.to_markdown(table, experiment.CAPTION))
    write_text(root / "table.csv", tables.to_csv(table))
    write_text(root / "table.tex", tables.to_latex(table, experiment.CAPTION))
    figure = experiment.figure(rows)
    for suffix in ("png", "pdf"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=160, bbox_inches="tight")
        write_bytes(root / f"figure.{suffix}", buffer.getvalue())
