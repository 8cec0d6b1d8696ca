"""Claims of a process that runs a sweep's trials itself, in their folders.

Two terminals that sweep into one folder, or a sweep and workers, thereby share the trials.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath

from softprompt import interrupts
from softprompt.distributed import agreed_text
from softprompt.errors import UserError
from softprompt.results import is_done
from softprompt.trials.engine import publish
from softprompt.trials.engine.claims import QUEUE, Claim, Claims, Heartbeat, View, taken_over
from softprompt.trials.engine.plan import PLAN
from softprompt.trials.engine.store import open_store
from softprompt.trials.lock import Locked
from softprompt.trials.outputs import SWEEP_FILE


class SweepClaims:
    """The claims of a run that trains in the store itself; of several processes, process 0 claims.

    Args:
        workdir: the sweep's, local or gs://.
    """

    def __init__(self, workdir: epath.PathLike) -> None:
        self._store = open_store(workdir)
        self._claims, self._left = Claims(self._store), False
        self._held: dict[str, Claim] = {}
        self.heartbeat = Heartbeat(self._claims, self._facts, seen=self._check)

    def leave(self) -> None:
        """Writes the last beat, after the sweep."""
        self._left = True
        if jax.process_index() == 0:
            self.heartbeat.stop()

    @contextmanager
    def claimed(self, trial: str, folder: epath.PathLike) -> Iterator[None]:
        """Claims a trial for the duration of the block, at whose end it is done.

        If a worker has published a newer checkpoint than the trial's folder holds, it is brought
        there. A trial that is done already, and has its row, is not claimed.

        Raises:
            Locked: another process holds it.
            UserError: the store is not reached, or the trial's row is not readable.
        """
        claim, outcome = None, ""
        if jax.process_index() == 0:
            try:
                if not self._has_row(trial, folder):
                    claim = self._take(trial, epath.Path(folder).name)
                    outcome = "claimed" if claim else "taken"
            except UserError as error:  # of all processes, so that none waits for this one
                outcome = f"error: {error}"
        outcome = agreed_text(outcome)
        if outcome == "taken":
            raise Locked(f"trial {trial} is run by another process; its claims are in {QUEUE}/")
        if outcome.startswith("error: "):
            raise UserError(outcome.removeprefix("error: "))
        if claim is None:
            yield
            return
        self._held[trial] = claim
        how = "released"
        try:
            yield
            how = ""
        except Exception:
            how = "failed"
            raise
        finally:
            del self._held[trial]
            if how:
                self._claims.end(claim, how, {"chip_seconds": 0.0, "lost": 0.0})
            else:
                self._store.create(f"{QUEUE}/done/{trial}", claim.facts["token"].encode())
                for key in self._claims.look().publications(claim):
                    self._store.delete(f"{QUEUE}/saved/{key}")

    def _has_row(self, trial: str, folder: epath.PathLike) -> bool:
        """Whether a trial is done, and its row is there."""
        return is_done(folder) and trial in self._claims.look().done

    def _take(self, trial: str, name: str) -> Claim | None:
        """Claims a trial; one that failed, or whose row was deleted, is run again.

        The publication is empty from the beginning, since checkpoints are in the folder `name`.
        """
        view = self._claims.look()
        if view.over(trial):
            for status in ("done", "failed"):
                self._store.delete(f"{QUEUE}/{status}/{trial}")
            view = self._claims.look()
        claim = self._claims.take(trial, view)
        if claim is not None:
            for key in view.publications(claim)[:1]:
                publish.bring_to_store(self._store, f"{QUEUE}/saved/{key}", name)
            self._store.write(f"{QUEUE}/saved/{claim.key}", b"")
        return claim

    def _facts(self) -> Mapping[str, Any]:
        held = {trial: {"chip_seconds": 0.0, "lost": 0.0} for trial in list(self._held)}
        facts = {"machine": self._claims.machine, "chips": 0}
        return {**facts, "held": held, "left": self._left}

    def _check(self, view: View) -> None:
        """Ends the process if another one has taken a trial over, after it had stood still."""
        for claim in list(self._held.values()):
            if taken_over(claim, view):
                line = f"softprompt: trial {claim.trial} was taken over by another process"
                print(line, file=sys.stderr, flush=True)
                os._exit(interrupts.PREEMPTED)


@contextmanager
def sweep_claims(workdir: epath.PathLike) -> Iterator[SweepClaims]:
    """The claims of a sweep, which beat for the duration of the block."""
    claims = SweepClaims(workdir)
    if jax.process_index() == 0:
        claims.heartbeat.start()
    try:
        yield claims
    finally:
        claims.leave()


def is_sweep(folder: epath.PathLike) -> bool:
    """Whether trials have been swept into a folder, or are planned there."""
    return any((epath.Path(folder) / name).exists() for name in (SWEEP_FILE, PLAN))
