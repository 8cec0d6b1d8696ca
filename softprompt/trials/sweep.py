"""Sweeps: run trials, one after another or in groups; skip finished ones."""

import contextlib
import functools
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
from etils import epath

from softprompt.config import ConfigDict, trial_id, trial_name
from softprompt.console import Progress
from softprompt.distributed import agreed, agreed_text
from softprompt.errors import UserError
from softprompt.files import check_writable, write_text
from softprompt.results import (
    Row,
    folders_by_id,
    is_done,
    make_row,
    outcome,
    read_result,
    write_result,
)
from softprompt.training.loop import Diverged
from softprompt.trials.engine.sharing import is_sweep, sweep_claims
from softprompt.trials.estimate import estimate as estimate_trial
from softprompt.trials.forecast import Estimate, Forecast
from softprompt.trials.groups import run_group, trial_groups
from softprompt.trials.lock import Locked
from softprompt.trials.run import run_trial
from softprompt.trials.session import Session
from softprompt.trials.starts import stages, start_id


def trial_folder(workdir: epath.PathLike, config: ConfigDict) -> epath.Path:
    """Returns a trial's folder: one in WORKDIR that ends in -ID, else WORKDIR/NAME-ID."""
    return trial_folders(workdir, [config])[0]


def trial_folders(workdir: epath.PathLike, trials: Sequence[ConfigDict]) -> list[epath.Path]:
    """Returns the folder of each trial; lists the working directory once."""
    root, there = epath.Path(workdir), folders_by_id(workdir)
    names = [(trial_id(config), trial_name(config)) for config in trials]
    return [there.get(identity, root / f"{name}-{identity}") for identity, name in names]


def run_sweep(
    trials: Sequence[ConfigDict],
    workdir: epath.PathLike,
    session: Session,
    *,
    estimate: Estimate | None = None,
    minutes: float = math.inf,
) -> list[Row]:
    """Runs the trials that are not done, one after another or in concurrent groups.

    A failed trial gets a row with its error, and the sweep continues; a rerun tries it again. An
    interruption (KeyboardInterrupt, or SystemExit(75) after SIGTERM) ends the sweep.

    Args:
        trials: resolved configs of different trials.
        workdir: has the trials' folders.
        session: of the process.
        estimate: returns the expected "seconds" of a config, to predict the remaining time.
        minutes: no trial starts after so many minutes; running trials continue.

    Returns:
        The rows of failed trials.
    """
    progress, time_over = session.progress, _clock(minutes)
    check_writable(workdir)
    folders = trial_folders(workdir, trials)
    todo = _not_done(folders)
    if finished := len(trials) - len(todo):
        progress.say(f"{finished} of {len(trials)} trials are done already")
    forecast = Forecast({index: trials[index] for index in todo}, estimate)
    failed, fail = list[Row](), functools.partial(_failed, progress)
    taken: set[str] = set()  # ids of trials that another process runs, or that start from these
    for positions, width in _groups(session, [trials[index] for index in todo]):
        if time_over():
            break
        members = {(index := todo[n]): (trials[index], folders[index]) for n in positions}
        taken |= {trial_id(config) for config, _ in members.values() if start_id(config) in taken}
        members = {n: job for n, job in members.items() if trial_id(job[0]) not in taken}
        if not members:
            continue
        indices, jobs = list(members), list(members.values())
        _announce(progress, [config for config, _ in jobs], forecast, len(trials))
        began = time.monotonic()
        for position, row in run_group(session, jobs, width, fail, time_over):
            index = indices[position]
            seconds, began = time.monotonic() - began, time.monotonic()
            others = [other for other in members if other in forecast.todo and other != index]
            done = row["status"] == "done"
            forecast.end(index, seconds, done=done, others=others[: width - 1])
            if done:
                ended = len(trials) - len(forecast.todo)
                left = forecast.left() if others else None  # otherwise shown with the next trial
                progress.finished(outcome(row), ended, len(trials), left)
            elif row["status"] == "failed":
                failed.append(row)
            else:
                taken.add(row["trial"])
    _say_left(progress, len(taken), len(forecast.todo) if time_over() else 0, len(trials))
    return failed


def _not_done(folders: Sequence[epath.Path]) -> list[int]:
    """Indices of the trials without a finished row, as the first process finds them.

    All processes use the first one's list, since another sweep may finish a trial between two
    listings.
    """
    found = [index for index, folder in enumerate(folders) if not is_done(folder)]
    todo: list[int] = json.loads(agreed_text(json.dumps(found)))
    return todo


def _say_left(progress: Progress, taken: int, waiting: int, total: int) -> None:
    """Says which trials a sweep that ends has not run."""
    if taken:
        progress.say(f"{taken} of {total} trials are left to other processes")
    if waiting:
        left_over = f"{waiting} of {total} trials are not started"
        progress.say(f"time limit reached: {left_over}; run the same command to continue")


def _announce(
    progress: Progress, group: Sequence[ConfigDict], forecast: Forecast, total: int
) -> None:
    """Shows which trials come next, and the remaining time."""
    forecast.estimate_model(group[0])
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    ended = total - len(forecast.todo)
    progress.trial(trial_name(group[0]) + more, ended, total, forecast.left())


def _clock(minutes: float) -> Callable[[], bool]:
    """A function that says whether so many minutes have passed since now."""
    end = time.monotonic() + 60 * minutes
    return lambda: agreed(time.monotonic() >= end)


def _groups(session: Session, trials: Sequence[ConfigDict]) -> Iterator[tuple[list[int], int]]:
    """Groups and their widths; a trial that starts from another's prompt is in a later group."""
    for stage in stages(trials):
        for positions, width in trial_groups(session, [trials[position] for position in stage]):
            yield [stage[n] for n in positions], width


def run_trials(
    trials: Sequence[ConfigDict],
    workdir: epath.PathLike,
    session: Session,
    minutes: float = math.inf,
) -> list[Row]:
    """Runs the trials that are not done; returns the rows of failed trials. See `run_sweep`."""
    with sweep_claims(workdir) as session.claims:
        expected = functools.partial(estimate_trial, session=session)
        return run_sweep(trials, workdir, session, estimate=expected, minutes=minutes)


def _failed(
    progress: Progress, config: ConfigDict, folder: epath.Path, error: Exception, seconds: float
) -> Row:
    """Records and reports a failed trial, and returns its row.

    A trial that another process runs has not failed: its row has the status "taken", and is not
    written.
    """
    if isinstance(error, Locked):
        progress.say(str(error))
        return {"trial": trial_id(config), "name": trial_name(config), "status": "taken"}
    row = record_failure(config, folder, error, seconds)
    how = "is done, but ended with an error" if row["status"] == "done" else "failed"
    progress.say(f"trial {row['name']} {how}: {reason(error)} (in {folder})")
    return row


def run_one(config: ConfigDict, folder: epath.PathLike, session: Session) -> Row:
    """Runs one trial, and returns its row. In a sweep's folder it claims the trial as a sweep does.

    Raises:
        UserError: anything that the user can mend; the loss is not finite.
        Exception: of a trial that failed, whose row and traceback are written.
    """
    parent, began = epath.Path(folder).parent, time.monotonic()
    claims = sweep_claims(parent) if is_sweep(parent) else contextlib.nullcontext()
    try:
        with claims as session.claims:
            return run_trial(config, folder, session=session)
    except Exception as error:
        if isinstance(error, Diverged) or not isinstance(error, UserError):
            record_failure(config, folder, error, time.monotonic() - began)
        raise


def record_failure(
    config: ConfigDict, folder: epath.PathLike, error: Exception, seconds: float
) -> Row:
    """Writes and returns a failed trial's row, with traceback.txt unless it is a UserError.

    Only process 0 writes. A row that is done stays, and is returned: the error came after the
    trial's end.
    """
    with contextlib.suppress(UserError):  # a row that is not readable is replaced
        if (there := read_result(folder)) is not None and there["status"] == "done":
            return there
    if not isinstance(error, UserError) and jax.process_index() == 0:
        text = "".join(traceback.format_exception(error))
        write_text(epath.Path(folder) / "traceback.txt", text)
    row = make_row(config, status="failed", error=reason(error), seconds=seconds)
    write_result(folder, row)
    return row


def reason(error: Exception) -> str:
    """The message of an error, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
