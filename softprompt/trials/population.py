"""Trials that run at a time: where it pays, one program of the vmapped step and update.

Each trial runs its own loop in a thread of its own, so that its data order, evaluations, early
stop, checkpoints and log are those of a trial alone (contract 6). Where a loop takes its step, its
thread waits for the others; the last to come runs all their steps as one program, in which the
frozen weights are not batched. Where trials are `apart` nobody waits: each runs the step of a trial
alone, beside the others'.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softprompt.training.memory import out_of_memory
from softprompt.training.prefetch import LOOK
from softprompt.training.step import Key, TrainStep, Tree


class Member(NamedTuple):
    """What is a trial's own in a step; the frozen weights are everybody's."""

    delta: Tree
    opt_state: Tree
    batch: Tree
    key: Key


def population_step(
    members: Sequence[Member],
    weights: Tree,
    *,
    step: TrainStep,
    along: jax.sharding.NamedSharding | None = None,
) -> list[tuple[Tree, Tree, Tree]]:
    """The steps of all members, vmapped over everything but the weights.

    Args:
        members: of equal shapes.
        weights: the frozen model.
        step: `train_step`, its static arguments given.
        along: how the axis of members lies over devices; None leaves that to their rows.

    Returns:
        For each member what `step` returns: delta, optimizer's state, metrics.
    """
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    if along is not None:
        together = jax.lax.with_sharding_constraint(together, along)
    results = jax.vmap(lambda m: step(m.delta, m.opt_state, weights, m.batch, m.key))(together)
    return [jax.tree.map(lambda leaf, n=n: leaf[n], results) for n in range(len(members))]


class Population:
    """The trials of a sweep that run at a time.

    Attributes:
        apart: how many, where each takes its own steps; 0 where they take them together.
        door: guards all that is here.
        coming: threads that were started for a trial and are not here yet.
        queued: trials that have not begun.
        undecided: threads whose trial is being prepared, or is between two.
        stopping: set when the sweep is to end: members save after their step.
    """

    def __init__(self, apart: int = 0) -> None:
        self.apart = apart
        self.door = threading.Condition()
        self.coming = self.queued = 0
        self.undecided: set[int] = set()
        self.stopping = threading.Event()
        self._meetings: dict[Any, Meeting] = {}

    @contextmanager
    def trial(self) -> Iterator[None]:
        """A trial in this thread, whose first step the others wait for until it is over."""
        with self.door:
            self.coming, self.queued = max(0, self.coming - 1), max(0, self.queued - 1)
            self.undecided.add(threading.get_ident())
        try:
            yield
        finally:
            self.leave()

    def join(
        self, key: Any, compile: Callable[[int], Any], say: Callable[[str], None]
    ) -> "Meeting":
        """Where those meet whose steps are one program.

        Args:
            key: all that is static in the step, and shapes.
            compile: compiles the program of so many members.
            say: is told where they turn out to be too many for the memory.
        """
        with self.door:
            meeting = self._meetings.setdefault(key, Meeting(self, compile, say))
            meeting.attending.add(threading.get_ident())
            self.undecided.discard(threading.get_ident())
            self.door.notify_all()
        return meeting

    def stop(self) -> None:
        """Members save after their step; who has not come is not waited for."""
        with self.door:
            self.coming = self.queued = 0
            self.stopping.set()
            self.door.notify_all()

    def leave(self) -> None:
        """This thread's trial takes no more steps."""
        with self.door:
            self.undecided.discard(threading.get_ident())
            for meeting in self._meetings.values():
                meeting.attending.discard(threading.get_ident())
            self.door.notify_all()


class Meeting:
    """Takes the steps of the trials that share a program, once all of them are here.

    A trial that is over leaves its place in the program to another, or empty: once no trial is left
    to take them, the program is compiled anew when more than half of its places are. Where memory
    has no room for so many steps at a time, half as many are taken, from then on.

    Attributes:
        attending: threads of its trials.
        programs: by their number of places.
        most: the most steps that memory has room for, as far as is known.
    """

    def __init__(
        self, population: Population, compile: Callable[[int], Any], say: Callable[[str], None]
    ) -> None:
        self.attending: set[int] = set()
        self.programs: dict[int, Any] = {}
        self.most = sys.maxsize
        self._population, self._compile, self._say = population, compile, say
        self._weights: Tree = None
        self._asked: dict[int, Member] = {}
        self._answers: dict[int, Any] = {}
        self._busy: dict[int, float] = {}  # when each last saw the devices at its step before
        self._idle: dict[int, float] = {}
        self._compiling = 0.0  # seconds

    def __call__(self, delta: Tree, opt_state: Tree, weights: Tree, batch: Tree, key: Any) -> Any:
        """The `TrainStep` of one of the trials: waits for the others'."""
        me, door = threading.get_ident(), self._population.door
        self._busy[me] = time.monotonic()
        with door:
            self._weights = weights if self._weights is None else self._weights
            assert weights is self._weights, "members step on one model's weights"
            self._asked[me] = Member(delta, opt_state, batch, key)
            door.notify_all()
            while me not in self._answers:
                if self._complete():
                    self._run()
                    door.notify_all()
                elif all(leaf.is_ready() for leaf in jax.tree.leaves(delta)):
                    door.wait()
                else:
                    door.wait(LOOK)
                    self._busy[me] = time.monotonic()
            answer = self._answers.pop(me)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def idle(self) -> float:
        """Seconds in which this thread's steps waited for the others', or for a compilation.

        Those in which the devices were still at the step before, up to `LOOK`, are left out.
        """
        return self._idle.get(threading.get_ident(), 0.0)

    @property
    def places(self) -> int:
        """The most that took a step together so far."""
        return max(self.programs, default=0)

    def memory_analysis(self) -> Any:
        """The compiler's account of the largest program."""
        return self.programs[self.places].memory_analysis() if self.programs else None

    def _complete(self) -> bool:
        """Whether all are here, and nobody is on the way of whom it is not known where to."""
        waiting = self._population.coming or self._population.undecided
        return not waiting and self.attending <= self._asked.keys()

    def _run(self) -> None:
        """Takes everybody's step; an error is of all whose step is not taken by then."""
        who, members = list(self._asked), list(self._asked.values())
        self._asked.clear()
        began, compiling = time.monotonic(), self._compiling
        answers: list[Any] = []
        try:
            while some := members[len(answers) :][: self.most]:
                answers += self._take(some)
        except Exception as error:
            answers += [error] * (len(who) - len(answers))
        self._answers.update(zip(who, answers, strict=True))
        for one in who:
            waited = began - self._busy[one] + self._compiling - compiling
            self._idle[one] = self._idle.get(one, 0.0) + waited

    def _take(self, members: list[Member]) -> list[Any]:
        """The steps of these; of none of them where there is no memory for so many."""
        places = self._places(len(members))
        filled = members + members[:1] * (places - len(members))
        try:
            if places not in self.programs:
                began = time.monotonic()
                self.programs[places] = self._compile(places)
                self._compiling += time.monotonic() - began
            return self.programs[places](filled, self._weights)[: len(members)]
        except Exception as error:
            if places == 1 or not out_of_memory(error):
                raise
        self.most = places // 2
        self.programs = {n: one for n, one in self.programs.items() if n <= self.most}
        self._say(f"no memory for {places} steps together: {self.most} at a time from now on")
        return []

    def _places(self, members: int) -> int:
        """The places of the program to run: as many as members where none fits that there is."""
        most = self.most if self._population.queued else 2 * members
        fitting = (places for places in self.programs if members <= places <= most)
        return min(fitting, default=members)
