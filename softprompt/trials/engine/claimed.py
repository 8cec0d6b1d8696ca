"""The trials that a worker holds: what is published of them, and how their claims end."""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from softprompt.trials.engine import publish
from softprompt.trials.engine.claims import MOST_DEATHS, QUEUE, Claim, Claims, View
from softprompt.trials.engine.plan import Job
from softprompt.trials.engine.store import Store


@dataclasses.dataclass
class ClaimedTrial:
    """A trial that this worker holds.

    Attributes:
        job, claim, folder: the trial, its claim and its folder in scratch.
        step: of the last published checkpoint.
        looked: when it was last looked for a newer one (`time.monotonic()`).
        spent: chip-seconds of this claim.
        unsaved: the part of them since the last publication.
        saved: the keys of the publications of all holders.
    """

    job: Job
    claim: Claim
    folder: epath.Path
    step: int
    looked: float
    spent: float = 0.0
    unsaved: float = 0.0
    saved: tuple[str, ...] = ()

    def facts(self) -> dict[str, float]:
        """What a beat and the end of the claim say."""
        return {"chip_seconds": self.spent, "lost": self.unsaved}


class ClaimedTrials:
    """The trials that a worker holds.

    Args:
        store: the sweep's.
        claims: the worker's.
        workdir: the folder of the trials' folders.
        local: whether it is scratch, from which trials are published; otherwise the store's.
        say: called with a line about each trial that is claimed or ends.

    Attributes:
        held: the trials by id.
        beat: writes the worker's beat, before a publication that needs a new one.
        lost: chip-seconds of earlier holders' work that the trials did again.
    """

    def __init__(
        self,
        store: Store,
        claims: Claims,
        *,
        workdir: epath.PathLike,
        local: bool,
        say: Callable[[str], None],
    ) -> None:
        self._store, self._claims = store, claims
        self._workdir, self._local, self._say = epath.Path(workdir), local, say
        self.held: dict[str, ClaimedTrial] = {}
        self.beat: Callable[[], Any] = functools.partial(claims.beat, {})
        self.lost = 0.0

    def begin(self, job: Job, claim: Claim, view: View) -> dict[str, Any]:
        """Takes up a claimed trial; returns the child's order to run it.

        The newest publication of earlier holders is brought to where it runs, unless a newer
        checkpoint is there. So is the prompt that the trial starts from.
        """
        folder = self._workdir / job.folder
        saved = view.publications(claim)
        if saved and self._local:
            publication = f"{QUEUE}/saved/{saved[0]}"
            publish.bring_to_scratch(self._store, publication, job.folder, Path(folder))
        elif saved:
            publish.bring_to_store(self._store, f"{QUEUE}/saved/{saved[0]}", job.folder)
        if job.start and self._local:
            publish.fetch_start(self._store, job.start, Path(self._workdir))
        step, now = publish.newest_step(folder), time.monotonic()
        self.held[job.trial] = ClaimedTrial(job, claim, folder, step, looked=now, saved=saved)
        self.lost += claim.facts.get("last_lost", 0.0)
        again = f", holder {claim.attempt}" if claim.attempt > 1 else ""
        self._say(f"claimed {job.name} ({job.trial}){again}")
        fail = ""
        if claim.facts.get("deaths", 0) >= MOST_DEATHS:
            fail = f"{MOST_DEATHS} holders died one after another without a new checkpoint"
        return {"folder": str(folder), "config": job.config, "trial": job.trial, "fail": fail}

    def spend(self, chip_seconds: float) -> None:
        """Counts the time of the devices, in equal shares for all trials."""
        for one in self.held.values():
            one.spent += chip_seconds / len(self.held)
            one.unsaved += chip_seconds / len(self.held)

    def publish_due(self) -> bool:
        """Publishes each trial whose last publication is old enough, if it has a new checkpoint.

        Returns:
            Whether there was one.
        """
        before = time.monotonic() - self._claims.timing.publish
        due = [one for one in self.held.values() if one.looked <= before]
        for one in due:
            one.looked = time.monotonic()
        return any([self._publish(one) for one in due])

    def _publish(self, one: ClaimedTrial) -> bool:
        """Publishes a trial's newest checkpoint and its files as one object, if there is a new one.

        For a trial that runs in the store the object is empty, and says that there was progress.
        """
        step = publish.newest_step(one.folder)
        if step <= one.step or not self._may_publish(one):
            return False
        content = publish.pack(Path(one.folder)) if self._local else b""
        self._store.write(f"{QUEUE}/saved/{one.claim.key}", content)
        one.step, one.unsaved = step, 0.0
        one.saved = (*one.saved, one.claim.key)
        return True

    def _may_publish(self, one: ClaimedTrial) -> bool:
        """Whether this worker still holds a trial, and is known to live."""
        if not self._claims.fresh():
            self.beat()
        return self._claims.holds(one.claim)

    def end(self, trial: str, *, done: bool, error: str, final: bool) -> bool:
        """Publishes a trial that has ended, or gives it back for another try.

        Args:
            trial: its id.
            done: whether it is done; otherwise it failed.
            error: one line.
            final: whether another try would fail in the same way.

        Returns:
            Whether the trial is over, with this worker's row.
        """
        one = self.held.pop(trial)
        again = not done and not final and not one.claim.facts.get("errors")
        if not self._may_publish(one):
            self._say(f"{one.job.name} was taken over by another worker")
            return False
        if again:
            self._claims.end(one.claim, "error", one.facts(), error)
            self._say(f"{one.job.name} is tried once more: {error}")
            return False
        self._publish_end(one, "done" if done else "failed")
        self._say(f"{one.job.name} is done" if done else f"{one.job.name} failed: {error}")
        return True

    def _publish_end(self, one: ClaimedTrial, status: str) -> None:
        """Publishes the files of a trial that is over, and deletes what is not needed any more."""
        if self._local:
            publish.publish_files(self._store, Path(one.folder), one.job.folder)
        if not self._may_publish(one):
            return
        past = one.claim.facts
        facts = {
            "machines": list(dict.fromkeys([*past.get("machines", []), past["machine"]])),
            "chip_seconds": past.get("chip_seconds", 0.0) + one.spent,
            "chip_seconds_lost": past.get("lost", 0.0),
        }
        publish.publish_row(self._store, one.folder, one.job.folder, facts)
        token = one.claim.facts["token"].encode()
        self._store.create(f"{QUEUE}/{status}/{one.job.trial}", token)
        if status == "failed":  # after the mark of its end, so that nobody claims it in between
            self._claims.end(one.claim, "failed", one.facts())
        if status == "done":
            for key in set(one.saved):
                self._store.delete(f"{QUEUE}/saved/{key}")
        if self._local:
            shutil.rmtree(one.folder, ignore_errors=True)

    def release(self, trial: str, how: str = "released") -> None:
        """Publishes a trial as far as it is, and gives its claim back."""
        one = self.held.pop(trial)
        self._publish(one)
        self._claims.end(one.claim, how, one.facts())

    def drop(self, trial: str) -> None:
        """Forgets a trial that another worker has taken over."""
        self._say(f"{self.held.pop(trial).job.name} was taken over by another worker")
