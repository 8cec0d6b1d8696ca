"""Sweeps: run an experiment's trials, one after another or in groups; skip finished ones.

An experiment is a Python file with `CAPTION`, `sweep(subset)`, `table(rows)` and `figure(rows)`,
such as those in `experiments/`. `rows` are the result rows of finished trials.
"""

import functools
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from etils import epath

from softprompt.config import (
    ConfigDict,
    chooses,
    flatten,
    reads,
    resolve,
    set_key,
    trial_id,
    trial_name,
    validate,
)
from softprompt.config.files import find_file, list_modules, load_module, with_location
from softprompt.console import Progress
from softprompt.distributed import agreed
from softprompt.errors import UserError, unknown
from softprompt.files import check_writable, write_text
from softprompt.results import Row, is_done, make_row, outcome, write_result
from softprompt.trials.forecast import Estimate, Forecast
from softprompt.trials.lock import Locked

if TYPE_CHECKING:
    from softprompt.trials.session import Session

RunTrial = Callable[[ConfigDict, epath.Path], Row]

_FUNCTIONS = ("sweep", "table", "figure")


def load_experiment(name: str) -> ModuleType:
    """Returns an experiment's module.

    Args:
        name: a path, or NAME for experiments/NAME.py in the working directory or the repository.

    Raises:
        UserError: there is no such file (lists the existing ones), or it is not an experiment.
    """
    file = find_file(name if name.endswith(".py") else f"experiments/{name}.py")
    if file is None:
        raise unknown("experiment", name, [Path(path).stem for path in list_modules("experiments")])
    try:
        module = load_module(file)
    except Exception as error:
        raise with_location(error, file) from error
    missing = [name for name in ("CAPTION", *_FUNCTIONS) if not hasattr(module, name)]
    if missing:
        raise UserError(f"{file}: not an experiment: it lacks {', '.join(missing)}")
    if not isinstance(module.CAPTION, str):
        raise UserError(f"{file}: CAPTION is {module.CAPTION!r}; allowed: a string")
    for function in _FUNCTIONS:
        if not callable(value := getattr(module, function)):
            raise UserError(f"{file}: {function} is {value!r}; allowed: a function")
    return module


def call_experiment(
    experiment: ModuleType, function: str, argument: object, *, returns: type
) -> Any:
    """Returns what a function of an experiment returns; a tuple or generator as a list.

    Raises:
        UserError: the function raises an error (names file and line), or its result has another
            type than `returns`.
    """
    file = Path(str(experiment.__file__))
    try:
        result = getattr(experiment, function)(argument)
        result = list(result) if isinstance(result, Iterator | tuple) else result
    except Exception as error:
        raise with_location(error, file) from error
    if not isinstance(result, returns):
        raise UserError(
            f"{file}: {function}() returned {_shortened(result)}; allowed: a {returns.__name__}"
        )
    return result


def _shortened(value: object) -> str:
    """The start of a value's repr, and its type."""
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def _experiment_configs(experiment: ModuleType, subset: str) -> list[ConfigDict]:
    """Calls an experiment's `sweep`, and checks that it returns configs."""
    configs: list[ConfigDict] = call_experiment(experiment, "sweep", subset, returns=list)
    wrong = [config for config in configs if not isinstance(config, ConfigDict)]
    if wrong or not configs:
        found = f"a list with {_shortened(wrong[0])}" if wrong else "no config"
        raise UserError(
            f"{experiment.__file__}: sweep({subset!r}) returned {found}; allowed: a list of configs"
        )
    return configs


def make_trials(
    experiment: ModuleType,
    subset: str = "full",
    overrides: Sequence[tuple[str, str]] = (),
    *,
    target: str | None = None,
) -> list[ConfigDict]:
    """Returns the resolved and validated configs of an experiment's trials.

    A key that only some methods, initialisers or optimizers use is overridden in the trials that
    use it. Overrides of the method, initialiser and optimizer are applied first.

    Args:
        experiment: see `load_experiment`.
        subset: a named part of it.
        overrides: pairs of keys and values.
        target: the backend to resolve for, "cpu", "gpu" or "tpu", or "" for configs that depend on
            none; None is JAX's own.

    Raises:
        UserError: a wrong subset, key or value, a key that no trial uses, two equal trials, or a
            config that depends on the backend without a target.
    """
    configs = _experiment_configs(experiment, subset)
    for key, value in sorted(overrides, key=lambda pair: not chooses(pair[0])):
        readers = [config for config in configs if reads(flatten(config), key)]
        for config in readers or configs:
            set_key(config, key, value)
    for config in configs:
        validate(config)
        if target == "" and config.model.dtype == "auto":
            raise UserError(
                f"--target is not given, and model.dtype is 'auto' in {trial_name(config)}; "
                "allowed: cpu, gpu, tpu"
            )
    trials = [resolve(config, backend=target or "") for config in configs]
    check_trials_differ(trials)
    return trials


def check_trials_differ(trials: Sequence[ConfigDict]) -> None:
    """Checks that all of a sweep's configs are different trials.

    Raises:
        UserError: two are the same trial; names their numbers.
    """
    seen: dict[str, int] = {}
    for number, config in enumerate(trials, 1):
        first = seen.setdefault(trial_id(config), number)
        if first != number:
            raise UserError(
                f"trials {first} and {number} of the sweep are the same, {trial_name(config)} "
                f"({trial_id(config)}); a sweep's trials must differ"
            )


def trial_folder(workdir: epath.PathLike, config: ConfigDict) -> epath.Path:
    """Returns a trial's folder: one in WORKDIR that ends in -ID, else WORKDIR/NAME-ID."""
    return trial_folders(workdir, [config])[0]


def trial_folders(workdir: epath.PathLike, trials: Sequence[ConfigDict]) -> list[epath.Path]:
    """Returns the folder of each trial; lists the working directory once."""
    root = epath.Path(workdir)
    there = sorted(child.name for child in root.iterdir()) if root.is_dir() else []
    by_id = {name.rpartition("-")[2]: name for name in reversed(there)}
    names = [(trial_id(config), trial_name(config)) for config in trials]
    return [root / by_id.get(identity, f"{name}-{identity}") for identity, name in names]


def run_sweep(
    trials: Sequence[ConfigDict],
    workdir: epath.PathLike,
    run_trial: RunTrial,
    *,
    progress: Progress,
    estimate: Estimate | None = None,
    session: "Session | None" = None,
    minutes: float = math.inf,
) -> list[Row]:
    """Runs the trials that are not done, one after another or in concurrent groups.

    A failed trial gets a row with its error, and the sweep continues; a rerun tries it again. An
    interruption (KeyboardInterrupt, or SystemExit(75) after SIGTERM) ends the sweep.

    Args:
        trials: resolved configs of different trials.
        workdir: has the trials' folders.
        run_trial: runs one config in its folder, writes its row and returns it.
        progress: the display.
        estimate: returns the expected "seconds" of a config, to predict the remaining time.
        session: for concurrent trials; None runs one after another.
        minutes: no trial starts when they have passed; those that run go on.

    Returns:
        The rows of failed trials.
    """
    late = _clock(minutes)
    check_writable(workdir)
    folders = trial_folders(workdir, trials)
    todo = [index for index, folder in enumerate(folders) if not is_done(folder)]
    if finished := len(trials) - len(todo):
        progress.say(f"{finished} of {len(trials)} trials are done already")
    forecast = Forecast({index: trials[index] for index in todo}, estimate)
    not_done: list[Row] = []
    for positions, width in _groups(session, [trials[index] for index in todo]):
        if late():
            break
        members = {(index := todo[n]): (trials[index], folders[index]) for n in positions}
        forecast.estimate_model(trials[next(iter(members))])
        ended = len(trials) - len(forecast.todo)
        progress.trial(_group_name(members), ended, len(trials), forecast.left())
        began = time.monotonic()
        for index, row in _run_group(members, width, run_trial, progress, session, late):
            seconds, began = time.monotonic() - began, time.monotonic()
            others = [other for other in members if other in forecast.todo and other != index]
            done = row["status"] == "done"
            forecast.end(index, seconds, done=done, others=others[: width - 1])
            if done:
                ended = len(trials) - len(forecast.todo)
                left = forecast.left() if others else None  # otherwise shown with the next trial
                progress.finished(outcome(row), ended, len(trials), left)
            else:
                not_done.append(row)
    if late() and forecast.todo:
        left_over = f"{len(forecast.todo)} of {len(trials)} trials are not started"
        progress.say(f"{minutes:g} minutes are over: {left_over}; the same command goes on")
    return _failures(not_done, progress)


def _failures(rows: Sequence[Row], progress: Progress) -> list[Row]:
    """The rows of failed trials among those that are not done; the others are taken."""
    failed = [row for row in rows if row["status"] == "failed"]
    if taken := len(rows) - len(failed):
        progress.say(f"trials that other processes run: {taken}")
    return failed


def _group_name(members: Mapping[int, tuple[ConfigDict, epath.Path]]) -> str:
    """The first trial's name, and how many others there are."""
    name = trial_name(next(iter(members.values()))[0])
    return f"{name} and {len(members) - 1} more" if len(members) > 1 else name


def _clock(minutes: float) -> Callable[[], bool]:
    """A function that says whether so many minutes have passed since now."""
    end = time.monotonic() + 60 * minutes
    return lambda: agreed(time.monotonic() >= end)


def _groups(
    session: "Session | None", trials: Sequence[ConfigDict]
) -> Iterable[tuple[list[int], int]]:
    """Groups of trials and their widths; without a session each trial is its own."""
    if session is None:
        return [([position], 1) for position in range(len(trials))]
    from softprompt.trials.groups import plan

    return plan(session, trials)


def run_trials(
    trials: Sequence[ConfigDict],
    workdir: epath.PathLike,
    session: "Session",
    minutes: float = math.inf,
) -> list[Row]:
    """Runs the trials that are not done; returns the rows of failed trials. See `run_sweep`."""
    from softprompt.trials.engine.sharing import shared
    from softprompt.trials.estimate import estimate
    from softprompt.trials.run import run_trial

    with shared(workdir) as session.claims:
        return run_sweep(
            trials,
            workdir,
            lambda config, folder: run_trial(config, folder, session=session),
            progress=session.progress,
            estimate=lambda config: estimate(config, session),
            session=session,
            minutes=minutes,
        )


def _run_group(
    members: Mapping[int, tuple[ConfigDict, epath.Path]],
    width: int,
    run_trial: RunTrial,
    progress: Progress,
    session: "Session | None",
    late: Callable[[], bool],
) -> Iterator[tuple[int, Row]]:
    """Runs a group; yields the index and the row of each trial when it ends.

    No other trial of it starts when it is late.
    """
    if session is None or width == 1:
        for index, job in members.items():
            yield index, _run_one(*job, run_trial, progress)
        return
    from softprompt.trials.groups import run_group

    indices, failed = list(members), functools.partial(_failed, progress)
    for position, row in run_group(session, list(members.values()), width, failed, late):
        yield indices[position], row


def _run_one(
    config: ConfigDict, folder: epath.Path, run_trial: RunTrial, progress: Progress
) -> Row:
    """Runs a trial and returns its row; an error becomes a failed row."""
    began = time.monotonic()
    try:
        return run_trial(config, folder)
    except Exception as error:
        return _failed(progress, config, folder, error, time.monotonic() - began)


def _failed(
    progress: Progress, config: ConfigDict, folder: epath.Path, error: Exception, seconds: float
) -> Row:
    """Records and reports a failed trial, and returns its row.

    One that another process runs is none: it is reported as "taken".
    """
    if isinstance(error, Locked):
        progress.say(str(error))
        return {"trial": trial_id(config), "name": trial_name(config), "status": "taken"}
    row = record_failure(config, folder, error, seconds)
    progress.say(f"trial {row['name']} failed: {row['error']} (in {folder})")
    return row


def record_failure(
    config: ConfigDict, folder: epath.PathLike, error: Exception, seconds: float
) -> Row:
    """Writes and returns a failed trial's row, with traceback.txt unless it is a UserError.

    Only process 0 writes.
    """
    import jax  # slow to import, and listing a sweep's trials does not need it

    if not isinstance(error, UserError) and jax.process_index() == 0:
        text = "".join(traceback.format_exception(error))
        write_text(epath.Path(folder) / "traceback.txt", text)
    row = make_row(config, status="failed", error=reason(error), seconds=seconds)
    write_result(folder, row)
    return row


def reason(error: Exception) -> str:
    """Returns the message of an error in one line, with its type if it is not the user's."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
