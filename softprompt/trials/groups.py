"""Runs groups of trials of a sweep concurrently.

A trial is a generator of training steps (`softprompt.trials.run.trial_steps`); one thread drives
all of them, and stacks their steps into one program.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from softprompt.analysis.flops import machine_flops
from softprompt.config import ConfigDict, runs_alone, trial_name, weights_key
from softprompt.results import Row
from softprompt.training.memory import MEMORY_SHARE, bytes_here, device_memory
from softprompt.training.step import StepCall, StepResult
from softprompt.trials.estimate import delta_size, step_memory
from softprompt.trials.prepare import (
    Prepared,
    delta_shapes,
    keep_probabilities,
    prepare,
    train_source,
)
from softprompt.trials.run import TrialSteps, run_trial, trial_steps
from softprompt.trials.session import Session, optimizer_config

Job = tuple[ConfigDict, epath.Path]
Failed = Callable[[ConfigDict, epath.Path, Exception, float], Row]

MOST = 16  # concurrent trials by default, on an accelerator


def trial_groups(session: Session, trials: Sequence[ConfigDict]) -> Iterator[tuple[list[int], int]]:
    """Groups of trials, as indices into `trials`, and how many of each run concurrently.

    Trials of a group share a compiled step and the weights. They may differ in seed, initialiser,
    rate, schedule, length of training, dropout rate and, if their rows have equal shapes, task.

    The groups of one model are yielded consecutively. Its trials are prepared when the first group
    is requested, so each model is loaded once. A trial that must run alone is a group of its own,
    and these groups keep the order of `trials`.
    """
    models: dict[Any, list[int]] = {}
    for index, config in enumerate(trials):
        key = weights_key(config) if most_at_once(config) > 1 else index
        models.setdefault(key, []).append(index)
    for indices in models.values():
        yield from _groups(session, trials, indices)


def _groups(
    session: Session, trials: Sequence[ConfigDict], indices: Sequence[int]
) -> Iterator[tuple[list[int], int]]:
    """The groups of one model's trials."""
    groups: dict[Any, list[int]] = {}
    widths: dict[Any, int] = {}
    for index in indices:
        key, width = _group_key(session, trials[index])
        groups.setdefault(key or index, []).append(index)
        widths[key or index] = min(width, widths.get(key or index, width))
    for key, group in groups.items():
        width = min(widths[key], len(group))
        if width == 1:
            yield from (([index], 1) for index in group)
            continue
        session.progress.say(
            f"{len(group)} trials like {trial_name(trials[group[0]])} share a program: {width} "
            "of them run at a time"
        )
        yield group, width


def _group_key(session: Session, config: ConfigDict) -> tuple[Any, int]:
    """The key of a trial's group, and how many may run concurrently; (None, 1) if it runs alone."""
    if most_at_once(config) == 1:
        return None, 1
    try:
        prepared = prepare(config, session)
        shape = train_source(prepared).template.shape
        leaves = jax.tree_util.tree_leaves_with_path(delta_shapes(prepared))
    except Exception:  # the trial itself will say what is wrong with it
        return None, 1
    sizes = tuple((str(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves)
    drops = tuple(keep_probabilities(config))
    rows = (shape, prepared.layout, sizes)
    key = (prepared.step, drops, optimizer_config(config), weights_key(config), rows)
    return key, max(1, min(most_at_once(config), trials_that_fit(prepared)))


def most_at_once(config: ConfigDict) -> int:
    """How many trials like this may run concurrently; 1 if it must run alone."""
    if runs_alone(config) or jax.process_count() > 1:
        return 1
    return int(config.compute.population or most_on(jax.default_backend()))


def most_on(backend: str) -> int:
    """How many trials run concurrently by default. A CPU gains nothing from more than one."""
    return 1 if backend == "cpu" else MOST


def trials_that_fit(prepared: Prepared) -> int:
    """How many trials like this fit into memory, by estimate.

    The devices along "data" share them.
    """
    each = step_memory(prepared, train_source(prepared).template.shape) + delta_size(prepared)[1]
    devices = 1 if jax.default_backend() == "cpu" else prepared.mesh.shape["data"]
    return int((MEMORY_SHARE * device_memory() - bytes_here(prepared.frozen)) * devices // each)


def run_group(
    session: Session,
    jobs: Sequence[Job],
    width: int,
    failed: Failed,
    time_over: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Row]]:
    """Runs a group's trials, `width` at a time; when one ends the next starts, unless time is over.

    With a width of 1 they run one after another. `failed` makes the row of a failed trial from its
    error and its seconds.

    Yields:
        The index in `jobs` and the row of each trial, when it ends.

    Raises:
        KeyboardInterrupt, SystemExit: after a signal, once every running trial is saved.
    """
    if width == 1:
        yield from ((index, _run_alone(session, job, failed)) for index, job in enumerate(jobs))
        return
    machine_flops(jobs[0][0].model.dtype)  # measured before any trial runs
    waiting, running = deque(enumerate(jobs)), list[_Running]()
    stopped: BaseException | None = None
    try:
        while running or (waiting and stopped is None and not time_over()):
            while waiting and len(running) < width and stopped is None and not time_over():
                running.append(_Running(*waiting.popleft(), session, failed))
                running[-1].begin()
                stopped = running[-1].stopped
            steps = [one for one in running if one.call is not None]
            _take_steps(session, steps, more_to_start=bool(waiting))
            for one in running:
                stopped = stopped or one.stopped
                if one.row is not None:
                    yield one.index, one.row
            running = [one for one in running if one.call is not None]
        if stopped is not None:
            raise stopped
    finally:
        for one in running:
            one.close()


def _run_alone(session: Session, job: Job, failed: Failed) -> Row:
    """Runs one trial and returns its row; an error becomes a failed row."""
    began = time.monotonic()
    try:
        return run_trial(*job, session=session)
    except Exception as error:
        return failed(*job, error, time.monotonic() - began)


class _Running:
    """A started trial. `call` has the arguments of its next step.

    When it ends, `row` is its result or `stopped` the signal that ended it.
    """

    def __init__(self, index: int, job: Job, session: Session, failed: Failed) -> None:
        self.index = index
        self.call: StepCall | None = None
        self.row: Row | None = None
        self.stopped: BaseException | None = None
        self._job, self._failed, self._began = job, failed, time.monotonic()
        self._sweep_session = session
        self.session = session
        self._steps = self._trial()

    def _trial(self) -> TrialSteps:
        config, folder = self._job
        with self._sweep_session.progress.for_trial(trial_name(config)) as progress:
            self.session = self._sweep_session.beside_others(progress)
            return (yield from trial_steps(config, folder, session=self.session))

    def begin(self) -> None:
        """Runs the trial until its first step."""
        with self._sweep_session.pauses():
            self._advance(lambda: next(self._steps))

    def resume(self, result: StepResult) -> None:
        """Sends the step's outputs, and runs the trial until its next step or its end."""
        self._advance(lambda: self._steps.send(result))

    def fail(self, error: Exception) -> None:
        """Ends the trial with an error."""
        self.close()
        self.row = self._failed(*self._job, error, time.monotonic() - self._began)

    def close(self) -> None:
        """Stops the trial."""
        self.call = None
        self._steps.close()

    def _advance(self, run: Callable[[], StepCall]) -> None:
        self.call = None
        try:
            self.call = run()
        except StopIteration as end:
            self.row = end.value
        except Exception as error:
            self.fail(error)
        except (KeyboardInterrupt, SystemExit) as stop:
            self.stopped = stop


def _take_steps(session: Session, running: Sequence[_Running], *, more_to_start: bool) -> None:
    """Takes the steps of all trials in one program, then advances each trial."""
    calls = [one.call for one in running if one.call is not None]
    if not calls:
        return
    compiling = running[0].session.compiling
    try:
        results = calls[0].program.steps(
            calls, compiling=compiling, more_to_start=more_to_start, say=session.progress.say
        )
    except Exception as error:
        for one in running:
            one.fail(error)
        return
    for one, result in zip(running, results, strict=True):
        one.session.members = max(one.session.members, len(running))
        one.resume(result)
