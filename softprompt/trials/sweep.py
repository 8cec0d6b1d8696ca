"""Sweeps: configs run one after another, finished ones skipped, then a table and a figure.

An experiment is a Python file in `experiments/` with `CAPTION`, `sweep(subset)`, `table(rows)` and
`figure(rows)`.
"""

import functools
import io
import statistics
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
    weights_key,
)
from softprompt.config.checks import reads
from softprompt.config.files import blamed, find_file, list_modules, load_module
from softprompt.config.schema import UNTRAINED
from softprompt.console import Progress, duration
from softprompt.errors import UserError, unknown
from softprompt.files import check_writable, write_bytes, write_text
from softprompt.results import Row, is_done, make_row, write_result

if TYPE_CHECKING:
    import pandas as pd

    from softprompt.trials.session import Session

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
        raise blamed(error, file) from error
    missing = [part for part in _PARTS if not hasattr(module, part)]
    if missing:
        raise UserError(f"{file}: no experiment, it lacks {', '.join(missing)}")
    return module


def ask(experiment: ModuleType, part: str, *arguments: Any) -> Any:
    """What a function of an experiment returns.

    Raises:
        UserError: its own, or a mistake in it, with the file and the line.
    """
    try:
        return getattr(experiment, part)(*arguments)
    except Exception as error:
        raise blamed(error, Path(str(experiment.__file__))) from error


def make_trials(
    experiment: ModuleType, subset: str = "full", overrides: Sequence[tuple[str, str]] = ()
) -> list[ConfigDict]:
    """Returns an experiment's resolved configs, overridden and validated.

    A key that some methods, optimizers or starts read, or those that train anything, is overridden
    in the trials that read it: as they are once methods, optimizers and starts are overridden.

    Raises:
        UserError: a wrong subset, key or value, a key that no trial reads, or two configs that are
            the same trial.
    """
    configs = list(ask(experiment, "sweep", subset))
    choosing = ("method.name", "method.init", "method.reparam", "optimizer.name")
    for key, value in sorted(overrides, key=lambda pair: pair[0] not in choosing):
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
    session: "Session | None" = None,
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
        session: of trials that may run at a time; None runs one after another.

    Returns:
        The rows that failed.
    """
    check_writable(workdir)
    folders = [trial_folder(workdir, config) for config in trials]
    todo = [index for index, folder in enumerate(folders) if not is_done(folder)]
    finished = len(trials) - len(todo)
    if finished:
        progress.say(f"{finished} of {len(trials)} trials are done already")
    forecast = Forecast({index: trials[index] for index in todo}, estimate)
    jobs = {index: (trials[index], folders[index]) for index in todo}
    groups: Iterable[tuple[list[int], int]] = [([place], 1) for place in range(len(todo))]
    if session is not None:
        from softprompt.trials.groups import plan

        groups = plan(session, [trials[index] for index in todo])
    failed: list[Row] = []
    for places, width in groups:
        members = {index: jobs[index] for index in (todo[place] for place in places)}
        first = trials[next(iter(members))]
        forecast.meet(first)
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        over = len(trials) - len(forecast.todo)
        progress.trial(trial_name(first) + more, over, len(trials), forecast.left())
        began = time.monotonic()
        for index, row in _run_group(members, width, run_trial, progress, session):
            seconds, began = time.monotonic() - began, time.monotonic()
            forecast.end(index, seconds, done=row["status"] == "done")
            if row["status"] != "done":
                failed.append(row)
    progress.trial("", len(trials), len(trials), 0.0)
    return failed


def _run_group(
    members: Mapping[int, tuple[ConfigDict, epath.Path]],
    width: int,
    run_trial: RunTrial,
    progress: Progress,
    session: "Session | None",
) -> Iterator[tuple[int, Row]]:
    """A group's trials by their index, in the order in which they end."""
    if session is None or width == 1:
        for index, job in members.items():
            yield index, _run_one(*job, run_trial, progress)
        return
    from softprompt.trials.groups import run_group

    indices, failed = list(members), functools.partial(_failed, progress)
    for place, row in run_group(session, list(members.values()), width, failed):
        yield indices[place], row


class Forecast:
    """Says how long the trials that are left will take, by estimates and by how those held.

    An estimate loads the trial's model. So it is made when the model's turn comes; until then a
    trial counts like the mean of the others.

    Attributes:
        todo: the trials that are left.
    """

    def __init__(self, todo: Mapping[int, ConfigDict], estimate: Estimate | None) -> None:
        self.todo = dict(todo)
        self._estimate = estimate
        self._expected: dict[int, float] = {}  # seconds; of those that are over, too
        self._spent = self._paid = 0.0

    def meet(self, config: ConfigDict) -> None:
        """The turn of a trial's model has come."""
        turn = weights_key(config)
        for index, other in self.todo.items():
            if index not in self._expected and weights_key(other) == turn:
                self._expected[index] = self._seconds(other)

    def _seconds(self, config: ConfigDict) -> float:
        """0 where the estimate fails, for then the trial will, and say why."""
        try:
            return self._estimate(config)["seconds"] if self._estimate else 1.0
        except Exception:
            return 0.0

    def left(self) -> float | None:
        """Seconds; None where nobody knows."""
        mean = statistics.fmean(self._expected.values()) if self._expected else 0.0
        rest = sum(self._expected.get(index, mean) for index in self.todo)
        if self._paid:
            return rest * self._spent / self._paid
        return rest if self._estimate else None

    def end(self, index: int, seconds: float, *, done: bool) -> None:
        """A trial is over, after so many seconds."""
        del self.todo[index]
        if done:
            self._spent, self._paid = self._spent + seconds, self._paid + self._expected[index]


def _run_one(
    config: ConfigDict, folder: epath.Path, run_trial: RunTrial, progress: Progress
) -> Row:
    """One trial's row, written as a failed one where it fails."""
    began = time.monotonic()
    try:
        return run_trial(config, folder)
    except Exception as error:
        return _failed(progress, config, folder, error, time.monotonic() - began)


def _failed(
    progress: Progress, config: ConfigDict, folder: epath.Path, error: Exception, seconds: float
) -> Row:
    """Records a failed trial, says so, and returns its row."""
    row = record_failure(config, folder, error, seconds)
    progress.say(f"trial {row['name']} failed: {row['error']} (in {folder})")
    return row


def record_failure(
    config: ConfigDict, folder: epath.PathLike, error: Exception, seconds: float
) -> Row:
    """Writes and returns a failed trial's row, and the traceback beside it unless a UserError.

    Of several processes the first writes.
    """
    import jax  # here, since what a sweep is made of needs none of it

    if not isinstance(error, UserError) and jax.process_index() == 0:
        text = "".join(traceback.format_exception(error))
        write_text(epath.Path(folder) / "traceback.txt", text)
    row = make_row(config, status="failed", error=_reason(error), seconds=seconds)
    write_result(folder, row)
    return row


def _reason(error: Exception) -> str:
    """An error in one line."""
    reason = " ".join(str(error).split())
    return reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"


def dry_run(
    trials: Sequence[ConfigDict], workdir: epath.PathLike, estimate: Estimate
) -> "pd.DataFrame":
    """Returns what a sweep would cost, a row a trial and a last row with the totals.

    A trial's "state" is "done", "to run", or "fails: ..." where it is known that it would.

    Args:
        trials: resolved configs.
        workdir: where finished trials are looked for.
        estimate: gives "trainable", "flops", "memory_bytes" and "seconds" of a config.
    """
    import pandas as pd  # slow to import

    rows: dict[int, dict[str, Any]] = {}
    flops = seconds = 0.0
    for index in sorted(range(len(trials)), key=lambda n: weights_key(trials[n])):
        config = trials[index]
        row = rows[index] = {
            "trial": trial_name(config),
            "id": trial_id(config),
            "state": "done" if is_done(trial_folder(workdir, config)) else "to run",
            "steps": 0 if config.method.name in UNTRAINED else config.train.steps,
        }
        try:
            cost = estimate(config)
        except Exception as error:
            row["state"] = f"fails: {_reason(error)}"
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


def write_outputs(experiment: ModuleType, rows: Sequence[Row], folder: epath.PathLike) -> None:
    """Writes table.md, .csv and .tex and figure.png and .pdf, each whole or not at all."""
    from softprompt.analysis import tables  # pandas is slow to import

    root = epath.Path(folder)
    table = ask(experiment, "table", rows)
    write_text(root / "table.md", tables.to_markdown(table, experiment.CAPTION))
    write_text(root / "table.csv", tables.to_csv(table))
    write_text(root / "table.tex", tables.to_latex(table, experiment.CAPTION))
    figure = ask(experiment, "figure", rows)
    for suffix in ("png", "pdf"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=160, bbox_inches="tight")
        write_bytes(root / f"figure.{suffix}", buffer.getvalue())
