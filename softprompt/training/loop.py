"""The loop around the training step: metrics a step behind, evaluations, checkpoints.

The loop is a generator: it yields what a step takes (`StepCall`) and is sent what the step returns
(`StepResult`). Who drives it decides how the step is taken: by itself, or stacked with the steps of
other trials.
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
from softprompt.data.pipeline import TrainSource, train_batches
from softprompt.errors import UserError
from softprompt.methods.delta_file import save_delta
from softprompt.models.dropout import Dropout, at_step
from softprompt.training import checkpoints
from softprompt.training.logs import MetricsLog
from softprompt.training.optimizers import averaged, set_rate
from softprompt.training.prefetch import Feed
from softprompt.training.step import StepCall, StepResult

Tree = Any
Steps = Generator[StepCall, StepResult, "State"]


class Diverged(UserError):
    """The loss or a norm is not finite; the trial's row says so."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, and how often what.

    Attributes:
        steps: updates in all.
        log_every: updates between log lines.
        eval_every: updates between validations; 0 for step 0 and the end only.
        checkpoint_every: updates between checkpoints.
        snapshots: updates between kept copies of the delta; 0 for none.
        patience: validations without a new best after which training stops; 0 for never.
        metric: the validation metric that "best" means, larger is better.
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
    """All that a trial changes.

    `best` is the delta, or average of deltas, that validated best, `step` counts updates, `seconds`
    is the wall time of the processes before this one, which began at `began`.
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

    def tested(self) -> Tree:
        """The delta that is validated and kept: see `averaged`."""
        return averaged(self.delta, self.opt_state)

    def selected(self, which: str) -> tuple[Tree, dict[str, float], int]:
        """The "best" or "last" delta, its validation's scores, and its step."""
        if which == "last":
            return self.tested(), self.last_scores, self.step
        return self.best, self.best_scores, self.best_step

    def elapsed(self) -> float:
        """Wall seconds spent on the trial so far, by all of its processes up to their last save."""
        return self.seconds + time.monotonic() - self.began

    def arrays(self) -> Tree:
        """What a checkpoint holds as arrays."""
        return {"delta": self.delta, "opt_state": self.opt_state, "best": self.best}

    def notes(self) -> dict[str, Any]:
        """What a checkpoint holds as JSON."""
        return {
            "best_step": self.best_step,
            "best_scores": self.best_scores,
            "last_scores": self.last_scores,
            "waited": self.waited,
            "seconds": self.elapsed(),
        }


class Pauses:
    """Seconds in which the trials of a process took no steps, for one of them did something else.

    Example:
        with pauses():
            validate()
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._open = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Adds the block's seconds; those of a block inside another count once."""
        began, self._open = time.monotonic(), self._open + 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self.seconds += time.monotonic() - began


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop works with.

    Attributes:
        program: names the compiled training step, for whoever takes it.
        weights: the frozen model.
        source: batches by step.
        rates: learning rate of each step [steps].
        dropout: the trial's; None where nothing is dropped.
        mesh: the devices.
        row_multiple: empty rows are added to a batch until its rows are a multiple of this.
        evaluate: delta -> validation metrics.
        fold: delta -> the delta without what only training needs.
        folder: the trial's.
        notes: JSON that every checkpoint carries.
        step_flops: useful operations of a step, on average.
        machine_flops: operations a second of all devices.
        stage: (what, done, total, note), for the progress display.
        pauses: shared by the trials of a process; their time is no step's.
    """

    program: Any
    weights: Tree
    source: TrainSource
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
    """The state of the newest checkpoint, laid out like `state`; None where there is none.

    Args:
        manager: of the trial's checkpoints.
        state: of the trial's first step.
        check: is given a checkpoint's step and notes before its arrays are read, whose shapes may
            be others; raises where the trial cannot go on from it.
        say: is given a line about each checkpoint that cannot be read.

    Raises:
        UserError: no checkpoint can be read; what `check` raises.
    """
    found = checkpoints.restore_newest(manager, state.arrays(), check=check, say=say)
    if found is None:
        return None
    step, notes, arrays = found
    names = ("best_step", "best_scores", "last_scores", "waited", "seconds")
    kept = {name: notes[name] for name in names}
    return State(**arrays, step=step, began=state.began, **kept)


def train(loop: LoopConfig, parts: Parts, state: State, log: MetricsLog, manager: Any) -> Steps:
    """Trains from `state` to the end, or to an early stop.

    Yields:
        What each step takes; it is sent what the step returns.

    Returns:
        The state at the end.

    Raises:
        Diverged: the loss is not finite; names the step and the last finite metrics.
        KeyboardInterrupt: after SIGINT, once the state is saved.
        SystemExit: with 75 after SIGTERM or SIGHUP, once the state is saved.
    """
    pending: tuple[int, dict[str, jax.Array], float] | None = None
    last: dict[str, float] = {}
    steps = {"start": state.step, "stop": loop.steps}
    batches = iter(train_batches(parts.source, **steps, row_multiple=parts.row_multiple))
    with saving(), Feed(parts.mesh, batches) as feed:
        if state.step == 0:
            with parts.pauses():
                validate(loop, parts, state, log)
        clock = Clock(parts, feed, state.step)
        while state.step < loop.steps and not stopped(loop, state):
            batch = feed.take(pending and pending[1])
            rate = float(parts.rates[state.step])
            opt_state = set_rate(state.opt_state, parts.rates[state.step])
            state.delta, state.opt_state, metrics = yield StepCall(
                parts.program,
                state.delta,
                opt_state,
                parts.weights,
                batch,
                at_step(parts.dropout, state.step),
            )
            if pending is not None:
                last = note(loop, parts, pending, log, clock, last)
            state.step += 1
            pending = (state.step, metrics, rate)
            asked = stop_requested()
            if due(loop, state, asked is not None):
                last = note(loop, parts, pending, log, clock, last)
                pending = None
                with parts.pauses():
                    finish_step(loop, parts, state, log, manager, asked)
                clock = Clock(parts, feed, state.step)
    return state


def saving() -> AbstractContextManager[None]:
    """Within the block signals wait for the end of a step; several processes leave that to JAX."""
    return interrupts.saving() if jax.process_count() == 1 else nullcontext()


_sync_points = itertools.count(1)  # of all trials: processes agree on numbers that only grow


def stop_requested() -> signal.Signals | None:
    """The signal that asks to stop after this step; of several processes all hear of it at once."""
    if jax.process_count() > 1:  # JAX listens for SIGTERM in each of them
        reached = multihost_utils.reached_preemption_sync_point(next(_sync_points))
        return signal.SIGTERM if reached else None
    return interrupts.requested()


def due(loop: LoopConfig, state: State, asked: bool) -> bool:
    """Whether something happens after this step that needs its metrics to be logged first."""
    every = (loop.eval_every, loop.checkpoint_every, loop.snapshots)
    return asked or state.step == loop.steps or any(n and state.step % n == 0 for n in every)


def finish_step(
    loop: LoopConfig,
    parts: Parts,
    state: State,
    log: MetricsLog,
    manager: Any,
    asked: signal.Signals | None,
) -> None:
    """Validation, snapshot, checkpoint, in this order: a checkpoint knows all that went before."""
    step, end = state.step, state.step == loop.steps
    if end or (loop.eval_every and step % loop.eval_every == 0):
        validate(loop, parts, state, log)
    if loop.snapshots and step % loop.snapshots == 0:
        file = parts.folder / "snapshots" / f"{step}.safetensors"
        save_delta(file, parts.fold(state.tested()), {"step": step, **parts.notes})
    stop = stopped(loop, state)
    if end or stop or asked or step % loop.checkpoint_every == 0:
        checkpoints.save(manager, step, state.arrays(), {**state.notes(), **parts.notes})
    if asked and not end and not stop:
        manager.wait_until_finished()
        raise interrupts.leaving(asked)


def stopped(loop: LoopConfig, state: State) -> bool:
    """Whether patience has run out."""
    return bool(loop.patience) and state.waited >= loop.patience


def validate(loop: LoopConfig, parts: Parts, state: State, log: MetricsLog) -> None:
    """Scores the validation split, logs it and keeps the delta if it is the best so far."""
    delta = state.tested()
    scores = parts.evaluate(delta)
    value = scores[loop.metric]
    log.write({"step": state.step, **{f"validation/{k}": v for k, v in scores.items()}})
    parts.stage("train", state.step, loop.steps, f"validation {loop.metric} {value:.4f}")
    state.last_scores = scores
    if not state.best_scores or value > state.best_scores[loop.metric]:
        state.best = jax.tree.map(lambda leaf: leaf.copy(), delta)
        state.best_step, state.best_scores, state.waited = state.step, scores, 0
    else:
        state.waited += 1


class Clock:
    """Steps, tokens and waiting since the last log line or pause, by the wall clock less pauses."""

    def __init__(self, parts: Parts, feed: Feed, step: int):
        self._parts, self._feed, self._step = parts, feed, step
        self._began, self._waited = self._now(), feed.waited

    def _now(self) -> float:
        return time.monotonic() - self._parts.pauses.seconds

    def rates(self, step: int) -> dict[str, float]:
        """Speeds since the last call, over the steps up to `step`."""
        parts, now, waited = self._parts, self._now(), self._feed.waited
        steps, seconds = range(self._step, step), max(now - self._began, 1e-9)
        input_wait = waited - self._waited
        self._step, self._began, self._waited = step, now, waited
        tokens = sum(parts.source.tokens(s) for s in steps)
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "examples_per_second": len(steps) * parts.source.template.examples / seconds,
            "peak_share": len(steps) * parts.step_flops / seconds / parts.machine_flops,
            "input_wait_share": input_wait / seconds,
        }


def note(
    loop: LoopConfig,
    parts: Parts,
    pending: tuple[int, dict[str, jax.Array], float],
    log: MetricsLog,
    clock: Clock,
    last: dict[str, float],
) -> dict[str, float]:
    """Fetches a step's metrics, refuses what is not finite, logs them when due; returns them."""
    step, device_metrics, rate = pending
    metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        log.write({"step": step, **metrics})
        fine = {name: value for name, value in metrics.items() if name not in bad}
        raise Diverged(
            f"step {step}: {_words(bad)}: not finite at rate {rate:.3g} (finite there: "
            f"{_words(fine)}); last finite metrics: {_words(last)}"
        )
    if step % loop.log_every == 0 or step == loop.steps:
        fill = parts.source.fill(step - 1)
        log.write({"step": step, **metrics, "rate": rate, "fill": fill, **clock.rates(step)})
    parts.stage("train", step, loop.steps, f"loss {metrics['loss']:.4f}")
    return metrics


def _words(metrics: dict[str, float]) -> str:
    """Metrics as "loss 0.4123, grad_norm 1.2"."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "none"
