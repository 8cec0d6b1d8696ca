"""The training loop: steps, delayed metrics, validations and checkpoints.

The loop is a generator. It yields the arguments of each step (`StepCall`), and the caller sends the
outputs (`StepResult`). The caller decides how to run the step: alone, or stacked with the steps of
other trials. Metrics of a step are fetched while the next one runs.
"""

import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from softprompt import interrupts
from softprompt.data.pipeline import BatchSource, train_batches
from softprompt.errors import UserError
from softprompt.methods.delta_file import save_delta
from softprompt.models.dropout import Dropout, at_step
from softprompt.training import checkpoints
from softprompt.training.logs import MetricsLog
from softprompt.training.optimizers import averaged, set_rate
from softprompt.training.prefetch import Prefetcher
from softprompt.training.step import StepCall, StepResult

Tree = Any
Steps = Generator[StepCall, StepResult, "State"]


class Diverged(UserError):
    """The loss or a norm is not finite. The trial fails with this error."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The length of training, and the intervals of everything else, all in steps.

    Attributes:
        steps: total number of updates.
        log_every: updates between log lines.
        eval_every: updates between validations; 0 validates at step 0 and at the end only.
        checkpoint_every: updates between checkpoints.
        snapshots: updates between saved copies of the delta; 0 for none.
        patience: training stops after this many validations without a new best; 0 is never.
        metric: the validation metric that selects the best delta; larger is better.
    """

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    snapshots: int
    patience: int
    metric: str


@dataclasses.dataclass
class State:
    """The state of a trial's training, after `step` updates.

    `best` is the delta, or moving average of deltas, with the best validation score; `waited`
    counts validations since then. `seconds` is the wall time of the trial's earlier processes, and
    `began` is when this process started to train it (`time.monotonic()`).
    """

    delta: Tree
    opt_state: Tree
    best: Tree
    step: int = 0
    best_step: int = 0
    best_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    last_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    waited: int = 0
    seconds: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def delta_to_evaluate(self) -> Tree:
        """The delta to validate and save: see `averaged`."""
        return averaged(self.delta, self.opt_state)

    def selected(self, which: str) -> tuple[Tree, dict[str, float], int]:
        """The "best" or "last" delta, its validation scores and its step."""
        if which == "last":
            return self.delta_to_evaluate(), self.last_scores, self.step
        return self.best, self.best_scores, self.best_step

    def elapsed(self) -> float:
        """Wall seconds of the trial so far; of earlier processes, up to their last checkpoint."""
        return self.seconds + time.monotonic() - self.began

    def arrays(self) -> Tree:
        """The arrays of a checkpoint."""
        return {"delta": self.delta, "opt_state": self.opt_state, "best": self.best}

    def notes(self) -> dict[str, Any]:
        """The JSON of a checkpoint."""
        return {
            "best_step": self.best_step,
            "best_scores": self.best_scores,
            "last_scores": self.last_scores,
            "waited": self.waited,
            "seconds": self.elapsed(),
        }


class Pauses:
    """Counts the seconds in which the trials of a process run no training steps.

    Example:
        with pauses():
            validate()
    """

    def __init__(self) -> None:
        self._closed, self._open, self._began = 0.0, 0, 0.0

    @property
    def seconds(self) -> float:
        """All seconds so far, including those of a block that is still open."""
        return self._closed + (time.monotonic() - self._began if self._open else 0.0)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Adds the block's seconds; nested blocks count once."""
        if not self._open:
            self._began = time.monotonic()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._closed += time.monotonic() - self._began


@dataclasses.dataclass(frozen=True)
class LoopInputs:
    """The inputs of a trial's training loop.

    Attributes:
        program: identifies the compiled training step to the caller.
        weights: the frozen model.
        source: batches by step.
        rates: learning rate of each step [steps].
        dropout: the trial's; None without dropout.
        mesh: the devices.
        row_multiple: batches are padded with empty rows to a multiple of this.
        evaluate: delta -> validation metrics.
        fold: delta -> the delta without parameters that only training needs.
        folder: the trial's.
        notes: JSON saved in every checkpoint.
        step_flops: mean useful FLOPs of a step.
        machine_flops: peak FLOPs per second of all devices.
        stage: called with (what, done, total, note) to show progress.
        pauses: shared by all trials of a process; excluded from step times.
    """

    program: Any
    weights: Tree
    source: BatchSource
    rates: np.ndarray
    dropout: Dropout | None
    mesh: jax.sharding.Mesh
    row_multiple: int
    evaluate: Callable[[Tree], dict[str, float]]
    fold: Callable[[Tree], Tree]
    folder: epath.Path
    notes: dict[str, Any]
    step_flops: float
    machine_flops: float
    stage: Callable[[str, int, int, str], None]
    pauses: Pauses = dataclasses.field(default_factory=Pauses)


def restore(
    manager: Any,
    state: State,
    *,
    check: Callable[[int, Mapping[str, Any]], None],
    say: Callable[[str], None],
) -> State | None:
    """Restores the newest readable checkpoint; None if there is no checkpoint.

    Args:
        manager: of the trial's checkpoints.
        state: the trial's initial state, for structure, shapes and shardings.
        check: called with a checkpoint's step and notes before its arrays are read; raises if the
            trial cannot resume from it.
        say: called with a line about each unreadable checkpoint.

    Raises:
        UserError: no checkpoint is readable; see also `check`.
    """
    restored = checkpoints.restore_newest(manager, state.arrays(), check=check, say=say)
    if restored is None:
        return None
    step, notes, arrays = restored
    names = ("best_step", "best_scores", "last_scores", "waited", "seconds")
    fields = {name: notes[name] for name in names}
    return State(**arrays, step=step, began=state.began, **fields)


def train(
    loop: LoopConfig, inputs: LoopInputs, state: State, log: MetricsLog, manager: Any
) -> Steps:
    """Trains from `state` to the end, or to an early stop.

    Yields:
        The arguments of each step. The caller sends the step's outputs.

    Returns:
        The final state.

    Raises:
        Diverged: the loss or a norm is not finite; names the step and the last finite metrics.
        KeyboardInterrupt: after SIGINT, once the state is saved.
        SystemExit: with 75 after SIGTERM or SIGHUP, once the state is saved.
    """
    pending: tuple[int, dict[str, jax.Array], float] | None = None
    last: dict[str, float] = {}
    batches = train_batches(
        inputs.source, start=state.step, stop=loop.steps, row_multiple=inputs.row_multiple
    )
    with deferred_signals(), Prefetcher(inputs.mesh, iter(batches)) as prefetcher:
        if state.step == 0:
            with inputs.pauses():
                validate(loop, inputs, state, log)
        clock = Clock(inputs, prefetcher, state.step)
        while state.step < loop.steps and not out_of_patience(loop, state):
            batch = prefetcher.take(pending and pending[1])
            rate = float(inputs.rates[state.step])
            opt_state = set_rate(state.opt_state, inputs.rates[state.step])
            state.delta, state.opt_state, metrics = yield StepCall(
                inputs.program,
                state.delta,
                opt_state,
                inputs.weights,
                batch,
                at_step(inputs.dropout, state.step),
            )
            if pending is not None:
                last = log_metrics(loop, inputs, pending, log, clock, last)
            state.step += 1
            pending = (state.step, metrics, rate)
            signalled = stop_requested()
            if due(loop, state, signalled is not None):
                last = log_metrics(loop, inputs, pending, log, clock, last)
                pending = None
                with inputs.pauses():
                    finish_step(loop, inputs, state, log, manager, signalled)
                clock = Clock(inputs, prefetcher, state.step)
    return state


def deferred_signals() -> AbstractContextManager[None]:
    """Defers signals in the block to the end of a step; with several processes, JAX does so."""
    return interrupts.deferred_signals() if jax.process_count() == 1 else nullcontext()


_sync_points = itertools.count(1)  # across all trials: sync points of JAX must increase


def stop_requested() -> signal.Signals | None:
    """The signal to stop after this step, or None; all processes see it at the same step."""
    if jax.process_count() > 1:  # JAX handles SIGTERM in each of them
        reached = multihost_utils.reached_preemption_sync_point(next(_sync_points))
        return signal.SIGTERM if reached else None
    return interrupts.requested()


def due(loop: LoopConfig, state: State, signalled: bool) -> bool:
    """Whether a validation, snapshot, checkpoint or stop follows this step."""
    every = (loop.eval_every, loop.checkpoint_every, loop.snapshots)
    return signalled or state.step == loop.steps or any(n and state.step % n == 0 for n in every)


def finish_step(
    loop: LoopConfig,
    inputs: LoopInputs,
    state: State,
    log: MetricsLog,
    manager: Any,
    signalled: signal.Signals | None,
) -> None:
    """Validates, then saves a snapshot, then a checkpoint, which includes the validation."""
    step, end = state.step, state.step == loop.steps
    if end or (loop.eval_every and step % loop.eval_every == 0):
        validate(loop, inputs, state, log)
    if loop.snapshots and step % loop.snapshots == 0:
        file = inputs.folder / "snapshots" / f"{step}.safetensors"
        save_delta(file, inputs.fold(state.delta_to_evaluate()), {"step": step, **inputs.notes})
    early = out_of_patience(loop, state)
    if end or early or signalled or step % loop.checkpoint_every == 0:
        checkpoints.save(manager, step, state.arrays(), {**state.notes(), **inputs.notes})
    if signalled and not end and not early:
        manager.wait_until_finished()
        raise interrupts.exit_exception(signalled)


def out_of_patience(loop: LoopConfig, state: State) -> bool:
    """Whether patience has run out."""
    return bool(loop.patience) and state.waited >= loop.patience


def validate(loop: LoopConfig, inputs: LoopInputs, state: State, log: MetricsLog) -> None:
    """Scores the validation split, logs the scores, and copies the delta if it is the best."""
    delta = state.delta_to_evaluate()
    scores = inputs.evaluate(delta)
    value = scores[loop.metric]
    log.write({"step": state.step, **{f"validation/{k}": v for k, v in scores.items()}})
    inputs.stage("train", state.step, loop.steps, f"validation {loop.metric} {value:.4f}")
    state.last_scores = scores
    if not state.best_scores or value > state.best_scores[loop.metric]:
        state.best = jax.tree.map(lambda leaf: leaf.copy(), delta)
        state.best_step, state.best_scores, state.waited = state.step, scores, 0
    else:
        state.waited += 1


class Clock:
    """Measures speeds since the last log line or validation; excludes pauses."""

    def __init__(self, inputs: LoopInputs, prefetcher: Prefetcher, step: int):
        self._inputs, self._prefetcher, self._step = inputs, prefetcher, step
        self._began, self._waited = self._now(), prefetcher.idle_seconds

    def _now(self) -> float:
        return time.monotonic() - self._inputs.pauses.seconds

    def speeds(self, step: int) -> dict[str, float]:
        """Speeds over the steps since the last call, up to `step`."""
        inputs, now, waited = self._inputs, self._now(), self._prefetcher.idle_seconds
        steps, seconds = range(self._step, step), max(now - self._began, 1e-9)
        input_wait = waited - self._waited
        self._step, self._began, self._waited = step, now, waited
        tokens = sum(inputs.source.tokens(s) for s in steps)
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "examples_per_second": len(steps) * inputs.source.examples / seconds,
            "peak_share": len(steps) * inputs.step_flops / seconds / inputs.machine_flops,
            "input_wait_share": input_wait / seconds,
        }


def log_metrics(
    loop: LoopConfig,
    inputs: LoopInputs,
    pending: tuple[int, dict[str, jax.Array], float],
    log: MetricsLog,
    clock: Clock,
    last: dict[str, float],
) -> dict[str, float]:
    """Fetches a step's metrics, raises `Diverged` unless all are finite, and logs them if due."""
    step, device_metrics, rate = pending
    metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    not_finite = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not_finite:
        log.write({"step": step, **metrics})
        finite = {name: value for name, value in metrics.items() if name not in not_finite}
        raise Diverged(
            f"step {step}: {_words(not_finite)}: not finite at rate {rate:.3g} (finite: "
            f"{_words(finite)}); last finite metrics: {_words(last)}"
        )
    if step % loop.log_every == 0 or step == loop.steps:
        fill = inputs.source.fill(step - 1)
        log.write({"step": step, **metrics, "rate": rate, "fill": fill, **clock.speeds(step)})
    inputs.stage("train", step, loop.steps, f"loss {metrics['loss']:.4f}")
    return metrics


def _words(metrics: dict[str, float]) -> str:
    """Metrics as "loss 0.4123, grad_norm 1.2"."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "none"
