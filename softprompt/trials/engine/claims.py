"""Claims: which worker holds which trial, as files in the results store.

Below `queue/` in the store, and each written once unless said otherwise:

    claims/ID.ATTEMPT   a worker holds the trial; another takes it over by creating ATTEMPT + 1
    ended/ID.ATTEMPT    how the claim ended, unless by the trial's end or the worker's death
    saved/ID.ATTEMPT    the holder's newest checkpoint and log (rewritten)
    done/ID           the trial's result.json is there, and done
    failed/ID         the same, and failed; workers write it, a plain sweep tries again
    beats/WORKER      written anew every 15 s while the worker lives
    stop              workers save and leave

One listing therefore is the state of a sweep. A claim is dead once an observer, by its own
monotonic clock, has seen no new beat of its worker for 90 s: clocks of two machines are never
compared. A process of the same machine that is gone is dead at once.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softprompt.trials.engine.store import Store, StoreError

QUEUE, STOP = "queue", "queue/stop"
WRITES = 1.0  # seconds between two writes of an object in a bucket
MOST_DEATHS = 3  # holders of a trial that die one after another without a new checkpoint


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds between events.

    Attributes:
        beat: between two beats of a worker.
        dead: without a new beat, until an observer calls a worker dead.
        fresh: age of a worker's own last beat up to which it may publish.
        publish: between two publications of a trial.
        grace: between SIGTERM and SIGKILL for a child.
        silent: without a message, until a child is killed.
    """

    beat: float = 15.0
    dead: float = 90.0
    fresh: float = 60.0
    publish: float = 30.0
    grace: float = 20.0
    silent: float = 900.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that a worker holds. `facts` are the content of the claim's file: see `history`."""

    trial: str
    attempt: int
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        """The last part of the names of the claim's files."""
        return f"{self.trial}.{self.attempt}"


class View:
    """The state of a sweep: a listing of `queue/`.

    Attributes:
        attempts: the newest attempt of each trial that was ever claimed.
        ended, saved: keys ID.ATTEMPT of claims.
        done, failed: ids of trials.
        beats: a text for each worker that changes with every beat.
        stop: whether workers shall leave.
    """

    def __init__(self, listing: Mapping[str, str]) -> None:
        parts: dict[str, dict[str, str]] = {}
        for name, version in listing.items():
            _, folder, *rest = name.split("/")
            parts.setdefault(folder, {})["/".join(rest)] = version
        self.attempts: dict[str, int] = {}
        for key in parts.get("claims", {}):
            trial, _, attempt = key.rpartition(".")
            self.attempts[trial] = max(int(attempt), self.attempts.get(trial, 0))
        self.ended = parts.get("ended", {}).keys()
        self.saved = parts.get("saved", {}).keys()
        self.done = parts.get("done", {}).keys()
        self.failed = parts.get("failed", {}).keys()
        self.beats = parts.get("beats", {})
        self.stop = STOP in listing

    def newest(self, trial: str) -> str:
        """The key of a trial's newest claim."""
        return f"{trial}.{self.attempts[trial]}"

    def publications(self, claim: Claim) -> tuple[str, ...]:
        """The keys of what holders of a claimed trial have published, the newest first."""
        keys = (f"{claim.trial}.{attempt}" for attempt in range(claim.attempt, 0, -1))
        return tuple(key for key in keys if key in self.saved)

    def over(self, trial: str) -> bool:
        """Whether a trial has its final row."""
        return trial in self.done or trial in self.failed

    def free(self, trial: str) -> bool:
        """Whether a trial can be claimed without a look at its last holder.

        It is not over, and was not claimed before, or its last claim has ended.
        """
        unclaimed = trial not in self.attempts or self.newest(trial) in self.ended
        return unclaimed and not self.over(trial)


class Claims:
    """The claims of one worker, and what it has observed of the others.

    Attributes:
        worker: its name, which begins with the host's.
        machine: the host and its devices, such as "tpu-3: 8 x TPU v6e", once they are known.
    """

    def __init__(
        self,
        store: Store,
        *,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timing = timing or Timing()
        self.host = socket.gethostname()
        self.worker = f"{self.host}-{os.getpid()}-{secrets.token_hex(3)}"
        self.machine = self.host
        self._store, self._clock = store, clock
        self._beaten = -float("inf")
        self._seen: dict[str, tuple[str, float]] = {}  # worker -> last beat, when it was new
        self._contents: dict[str, dict[str, Any]] = {}  # of files that never change

    def beat(self, facts: Mapping[str, Any]) -> View:
        """Writes this worker's beat, then looks at the sweep."""
        began = self._clock()
        content = {"worker": self.worker, "host": self.host, "time": time.time(), **facts}
        self._store.write(f"{QUEUE}/beats/{self.worker}", _encode(content))
        self._beaten = began
        return self.look()

    def look(self) -> View:
        """Returns the state of the sweep, and remembers since when each beat is there."""
        view, now = View(self._store.list(QUEUE)), self._clock()
        for worker, version in view.beats.items():
            if self._seen.get(worker, ("", 0.0))[0] != version:
                self._seen[worker] = (version, now)
        return view

    def alive(self, view: View) -> list[str]:
        """The workers with a heartbeat seen in the last `dead` seconds, this one included."""
        now, dead = self._clock(), self.timing.dead
        return [one for one in view.beats if now - self._seen[one][1] < dead]

    def take(self, trial: str, view: View) -> Claim | None:
        """Claims a trial; None if it is over, or held by another worker that may live."""
        if view.over(trial):
            return None
        attempt = view.attempts.get(trial, 0)
        if attempt and not view.free(trial) and not self._dead(view.newest(trial), view):
            return None
        past = self.history(trial, view) if attempt else {}
        identity = {"worker": self.worker, "host": self.host, "process": _process()}
        facts = {**past, **identity, "token": secrets.token_hex(8), "machine": self.machine}
        claim = Claim(trial, attempt + 1, facts)
        if not self._store.create(f"{QUEUE}/claims/{claim.key}", _encode(facts)):
            return None
        return claim

    def fresh(self) -> bool:
        """Whether the last beat is so recent that no observer can declare this worker dead yet."""
        return self._clock() - self._beaten < self.timing.fresh

    def holds(self, claim: Claim) -> bool:
        """Whether nobody has taken a claim over: the next attempt does not exist."""
        return self._store.read(f"{QUEUE}/claims/{claim.trial}.{claim.attempt + 1}") is None

    def end(self, claim: Claim, how: str, spent: Mapping[str, float], error: str = "") -> None:
        """Ends a claim.

        Args:
            claim: held by this worker.
            how: "released", "died" (the process did), "error" (which is tried once more) or
                "failed".
            spent: see `history`.
            error: one line.
        """
        facts = {"how": how, "error": error, "host": self.host, "token": secrets.token_hex(8)}
        self._store.create(f"{QUEUE}/ended/{claim.key}", _encode(facts | dict(spent)))

    def failed_here(self, trial: str, view: View) -> bool:
        """Whether a trial's last error was on this host, and another host may try it."""
        if trial not in view.attempts or view.newest(trial) not in view.ended:
            return False
        ended = self._read(f"ended/{view.newest(trial)}")
        if ended["how"] != "error" or ended["host"] != self.host:
            return False
        return any(not worker.startswith(f"{self.host}-") for worker in self.alive(view))

    def _dead(self, key: str, view: View) -> bool:
        """Whether the worker of a claim is dead."""
        facts = self._read(f"claims/{key}")
        worker = facts["worker"]
        if worker == self.worker:
            return False
        if _gone(facts["process"]):
            return True
        if worker not in view.beats:  # it beats before it claims, perhaps after the listing
            return self._store.read(f"{QUEUE}/beats/{worker}") is None
        return self._clock() - self._seen[worker][1] >= self.timing.dead

    def deaths(self, trial: str, view: View) -> int:
        """How many holders of a trial died one after another, if its last claim has ended."""
        ended = trial in view.attempts and view.newest(trial) in view.ended
        return int(self.history(trial, view).get("deaths", 0)) if ended else 0

    def history(self, trial: str, view: View) -> dict[str, Any]:
        """What a new claim says of earlier ones.

        deaths: holders that died one after another without a new checkpoint; errors: the errors
        that are tried once more; machines: of the holders; chip_seconds: of all holders; lost: the
        part of them after the last publications; last_lost: the last holder's.
        """
        key = view.newest(trial)
        last = self._read(f"claims/{key}")
        ended = self._read(f"ended/{key}") if key in view.ended else self._last_beat(last, trial)
        if ended["how"] == "failed":
            return {}
        deaths = 0 if key in view.saved else last.get("deaths", 0) + (ended["how"] == "died")
        return {
            "deaths": deaths,
            "errors": last.get("errors", []) + [ended["error"]] * (ended["how"] == "error"),
            "machines": list(dict.fromkeys([*last.get("machines", []), last["machine"]])),
            "chip_seconds": last.get("chip_seconds", 0.0) + ended["chip_seconds"],
            "lost": last.get("lost", 0.0) + ended["lost"],
            "last_lost": ended["lost"],
        }

    def _last_beat(self, claim: Mapping[str, Any], trial: str) -> dict[str, Any]:
        """How a claim of a dead worker ended, from the worker's last beat."""
        content = self._store.read(f"{QUEUE}/beats/{claim['worker']}")
        held = json.loads(content).get("held", {}) if content else {}
        return {"how": "died", "error": "", **held.get(trial, {"chip_seconds": 0.0, "lost": 0.0})}

    def _read(self, name: str) -> dict[str, Any]:
        """The content of a file that never changes."""
        if name not in self._contents:
            content = self._store.read(f"{QUEUE}/{name}")
            assert content is not None, f"{name} was listed"
            self._contents[name] = json.loads(content)
        return self._contents[name]


class Heartbeat:
    """Beats in a thread of its own, and keeps the newest view of the sweep.

    Args:
        claims: the worker's.
        facts: returns the content of a beat.
        seen: called with the view after each beat.

    Attributes:
        view: the newest, from the last beat.
    """

    view: View

    def __init__(
        self,
        claims: Claims,
        facts: Callable[[], Mapping[str, Any]],
        *,
        seen: Callable[[View], None] = lambda view: None,
    ) -> None:
        self._claims, self._facts, self._tell = claims, facts, seen
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="beats")

    def start(self) -> None:
        """Beats at once, and then at intervals.

        Raises:
            StoreError: the first beat cannot be written.
        """
        self.beat()
        self._thread.start()

    def beat(self) -> View:
        """Beats now."""
        with self._lock:
            self.view = self._claims.beat(self._facts())
        return self.view

    def look(self) -> View:
        """Looks at the sweep between two beats."""
        self.view = self._claims.look()
        return self.view

    def stop(self) -> None:
        """Writes the last beat, and beats no more."""
        self._stop.set()
        self._thread.join()
        time.sleep(WRITES)  # after the last one
        self.beat()

    def _run(self) -> None:
        while not self._stop.wait(self._claims.timing.beat):
            with contextlib.suppress(StoreError):  # the next beat may succeed
                self._tell(self.beat())


def taken_over(claim: Claim, view: View) -> bool:
    """Whether another worker has taken a claim over."""
    return view.attempts.get(claim.trial, 0) > claim.attempt


def _encode(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _process() -> dict[str, Any]:
    """Identifies this process: its machine, boot and process namespace, number and start."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str:
    """When a process started, in clock ticks since the machine did; "" if it has ended.

    The wall clock may be set while a process runs.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # proc(5): the state, and the 22nd field


def _machine() -> str:
    """Identifies the processes that this one can see; "" if nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _gone(process: Mapping[str, Any]) -> bool:
    """Whether a process ran on this machine, and does not any more."""
    if not process["machine"] or process["machine"] != _machine():
        return False
    return _started(process["pid"]) != process["started"]
