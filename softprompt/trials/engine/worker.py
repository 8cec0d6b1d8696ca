"""A worker: claims trials of a sweep's plan, and lets a child process run them.

The worker itself never imports JAX, so it beats, publishes and ends on time whatever the child is
compiling. It alone reads and writes the store. The child trains in local scratch.
"""

import contextlib
import functools
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from softprompt import interrupts
from softprompt.distributed import parse_distributed
from softprompt.errors import UserError
from softprompt.trials.engine.claimed import ClaimedTrials
from softprompt.trials.engine.claims import Claims, Heartbeat, Timing, View, taken_over
from softprompt.trials.engine.compiled import Programs
from softprompt.trials.engine.link import Child, Message
from softprompt.trials.engine.plan import Plan, check_backend, check_worker, read_plan
from softprompt.trials.engine.restarts import CRASHED, STOPPED
from softprompt.trials.engine.schedule import all_over, take_next
from softprompt.trials.engine.store import StoreError, open_store

CHILD = (sys.executable, "-m", "softprompt.trials.engine.child")
MOST_STARTS = 3  # of a child, one after another, that finds no devices
TICK = 0.2  # seconds between two looks at what is due

Say = Callable[[str], None]


def print_line(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def work(
    workdir: os.PathLike[str] | str,
    *,
    minutes: float = math.inf,
    distributed: str | None = None,
    command: Sequence[str] = CHILD,
    timing: Timing | None = None,
    say: Say = print_line,
) -> int:
    """Runs trials of the plan in a store until none is left, and waits for those of other workers.

    Args:
        workdir: the sweep's, local or gs://.
        minutes: no trial is claimed when they have passed.
        distributed: "HOST:PORT,I,N": trials are run by N processes together, of which this is the
            I-th from 0, in the store itself. The first one's worker claims, and the others follow.
        command: the child process.
        timing: of everything that is done in intervals.
        say: called with a line about each trial that is claimed or ends.

    Returns:
        The exit code: 0 if every trial is done, 1 if all are over and some failed, 3 if `stop` is
        in the store, 75 if trials are left when time is over or the store is not reached,
        70 after an error of the worker itself. After 70 and 75 it is started again.

    Raises:
        UserError: there is no plan, its code or target is another, or no device can be opened.
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM; checkpoints are published.
    """
    store = open_store(workdir)
    plan = read_plan(store)
    check_worker(plan)
    timing, scratch, follows = timing or Timing(), scratch_folder(plan), False
    claims = Claims(store, timing=timing)
    if distributed is not None:
        member = parse_distributed(distributed)
        follows = member is None or member[1] > 0
        command = [*command, distributed]
    local = distributed is None
    claimed = ClaimedTrials(
        store, claims, workdir=scratch if local else workdir, local=local, say=say
    )
    with interrupts.deferred_signals():
        programs = Programs(store, scratch)
        child = functools.partial(Child, command, programs.environment())
        worker = Worker(plan, claims, claimed, child, programs=programs, follows=follows, say=say)
        try:
            return worker.run(60 * minutes)
        except StoreError as error:  # others take the trials over; a new worker may have more luck
            say(str(error))
            return interrupts.PREEMPTED
        except UserError:
            raise
        except Exception:
            traceback.print_exc()
            return CRASHED


class Worker:
    """The events of a worker: messages of its child, and what is due by the clock.

    Args:
        plan: the sweep's.
        claims: the worker's.
        claimed: the trials that it holds.
        child: starts the child.
        programs: that it compiles.
        follows: whether another worker claims what the child runs.
        say: see `work`.
    """

    def __init__(
        self,
        plan: Plan,
        claims: Claims,
        claimed: ClaimedTrials,
        child: Callable[[], Child],
        *,
        programs: Programs,
        follows: bool,
        say: Say,
    ) -> None:
        self._plan, self._claims, self._claimed, self._say = plan, claims, claimed, say
        self._new_child, self._follows, self._timing = child, follows, claims.timing
        self._programs, self._groups = programs, set[str]()
        self._heartbeat = Heartbeat(claims, self._facts)
        claimed.beat = self._heartbeat.beat
        self._held = claimed.held
        self._child: Child | None = None
        self._failed_starts = 0  # of children, one after another, that did not find their devices
        self._opened = False  # whether the child has said that it opened its devices, or could not
        self._wants, self._looked_at = False, View({})
        self._widths, self._model = {"": 1}, ""
        self._chips, self._used = 0, 0.0
        self._counts = {"done": 0, "failed": 0}
        self._stages: dict[str, str] = {}
        self._problem, self._left = "", False
        self._heard = self._ticked = time.monotonic()

    def run(self, seconds: float) -> int:
        """Runs trials until none is left or something stops the worker; see `work`."""
        end = time.monotonic() + seconds
        self._heartbeat.start()
        try:
            while (code := self._finished(late=time.monotonic() > end)) is None:
                if self._child is None:
                    time.sleep(self._timing.beat if self._problem else 0.0)
                    self._child, self._opened = self._new_child(), False
                    self._heard = time.monotonic()
                self._handle(self._child.receive(TICK))
                self._tick(claims=time.monotonic() <= end)
            return code
        finally:
            if self._child is not None:
                self._child.kill()
            self._left = True
            with contextlib.suppress(UserError):
                self._heartbeat.stop()

    def _finished(self, *, late: bool) -> int | None:
        """The exit code, if the worker shall leave now."""
        view, number = self._heartbeat.view, interrupts.requested()
        if not self._held and all_over(self._plan, view):
            self._let_save()
            return int(any(job.trial in view.failed for job in self._plan.jobs))
        busy = self._held or (self._follows and self._child is not None)
        if number is None and not view.stop and (busy or not late):
            return None
        self._let_save()
        if number is not None:
            raise interrupts.exit_exception(number)
        if view.stop:
            self._say("stopped; after softprompt stop --undo, run the same command to continue")
        return STOPPED if view.stop else interrupts.PREEMPTED

    def _let_save(self) -> None:
        """Lets the child save and exit, kills it after a while, and gives all trials back."""
        if self._child is not None:
            if self._wants and not self._follows:
                self._child.send("run", jobs=[])  # nothing: it ends, and so do those that follow
            else:
                self._child.terminate()
            end, running = time.monotonic() + self._timing.grace, True
            while running and time.monotonic() < end:
                message = self._child.receive(TICK)
                running = message is None or message["kind"] != "exit"
                if message is not None and message["kind"] == "ended":
                    self._handle(message)
            self._child.kill()
            self._child = None
        for trial in list(self._held):
            self._claimed.release(trial)

    def _handle(self, message: Message | None) -> None:
        """Acts on a message of the child."""
        if message is None:
            return
        self._heard = time.monotonic()
        match message.pop("kind"):
            case "ready":
                check_backend(self._plan, message["backend"], message["dtype"])
                self._claims.machine = f"{self._claims.host}: {message['devices']}"
                self._chips, self._widths[""] = message["chips"], message["width"]
                self._failed_starts, self._problem, self._opened = 0, "", True
                self._programs.kind = message["programs"]
                self._programs.fetch()
            case "unable":
                state = "waits for its other hosts" if message["later"] else "opens no device"
                self._problem, self._opened = f"{state}: {message['error']}", True
                self._failed_starts += not message["later"]
                self._say(self._problem)
            case "next":
                self._wants, self._looked_at = True, View({})
            case "stage":
                self._stages[message["trial"]] = message["text"]
            case "returned":
                for trial in self._held.keys() & set(message["trials"]):  # none in a follower
                    if message["width"]:
                        self._widths[self._held[trial].job.group] = message["width"]
                    self._claimed.release(trial)
            case "ended":
                trial = message.pop("trial")
                if trial in self._held and self._claimed.end(trial, **message):
                    self._counts["done" if message["done"] else "failed"] += 1
                self._programs.publish(idle=not self._held)
            case "exit":
                self._child_ended(message["code"])

    def _child_ended(self, code: int) -> None:
        """Gives the trials of a child that ended back, and has another one started.

        Exit code 75 is of several processes, of which another one was told to stop.

        Raises:
            UserError: several children one after another have found no devices.
        """
        if not self._opened:
            self._problem = f"the process ended with {code} before it opened a device"
            self._failed_starts += 1
            self._say(self._problem)
        self._child, self._wants = None, False
        self._programs.forget_unfinished()
        for trial in list(self._held):
            self._say(f"the process of {self._held[trial].job.name} died")
            self._claimed.release(trial, "released" if code == interrupts.PREEMPTED else "died")
        if self._failed_starts >= MOST_STARTS:
            raise UserError(f"{self._claims.host} {self._problem}")

    def _tick(self, *, claims: bool) -> None:
        """Does what is due."""
        now, view = time.monotonic(), self._heartbeat.view
        spent, self._ticked = (now - self._ticked) * self._chips, now
        if self._held:
            self._used += spent
            self._claimed.spend(spent)
        if self._claimed.publish_due():
            self._programs.publish()
        if any(taken_over(one.claim, view) for one in self._held.values()):
            self._end_child("a trial was taken over by another worker")
        elif self._held and now - self._heard > self._timing.silent:
            self._end_child(f"the process said nothing for {self._timing.silent:g} s")
        if self._wants and claims and not self._follows and view is not self._looked_at:
            self._claim()

    def _end_child(self, reason: str) -> None:
        """Kills the child, and gives its trials back."""
        self._say(reason)
        view = self._heartbeat.view
        for trial in [t for t, one in self._held.items() if taken_over(one.claim, view)]:
            self._claimed.drop(trial)
        if self._child is not None:
            self._child.kill()

    def _claim(self) -> None:
        """Claims trials for the child, which is waiting."""
        view = self._looked_at = self._heartbeat.look()
        taken = take_next(self._plan, self._claims, view, widths=self._widths, model=self._model)
        if taken and self._child is not None:
            self._wants, self._model, self._stages = False, taken[0][0].model, {}
            if (group := taken[0][0].group) not in self._groups:
                self._groups.add(group)
                self._programs.fetch()
            jobs = [self._claimed.begin(job, claim, view) for job, claim in taken]
            self._child.send("run", jobs=jobs)

    def _stage(self, name: str) -> str:
        """What a trial does; a child that runs one alone does not name it."""
        return self._stages.get(name) or self._stages.get("", "")

    def _facts(self) -> dict[str, Any]:
        """The content of a beat."""
        held = dict(self._held)
        return {
            "machine": self._claims.machine,
            "chips": self._chips,
            "chip_seconds": self._used,
            "chip_seconds_lost": self._claimed.lost,
            "held": {trial: one.facts() for trial, one in held.items()},
            "stages": {one.job.name: self._stage(one.job.name) for one in held.values()},
            "problem": self._problem,
            "left": self._left,
            **self._counts,
        }


def scratch_folder(plan: Plan) -> Path:
    """The folder in which workers of this host keep a sweep's unfinished trials."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"softprompt-{user}" / plan.token
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
