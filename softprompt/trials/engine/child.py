"""A worker's child: one JAX session that runs the trials that the worker has claimed.

Started by a worker as `python -m softprompt.trials.engine.child [HOST:PORT,I,N] FD`.
Messages to the worker: ready or unable, next, stage, returned, ended. Orders: run.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from softprompt import interrupts
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.trials.engine.link import Link, Message, parent

if TYPE_CHECKING:
    from etils import epath

    from softprompt.config import ConfigDict
    from softprompt.results import Row
    from softprompt.trials.session import Session

Orders = Sequence[Mapping[str, Any]]
Run = Callable[[Orders], bool]
Receive = Callable[[], Message | None]

HEARTBEAT = 30  # seconds until JAX takes another process of a trial for lost
POLL_SECONDS = 2.0  # between two synchronisations of all processes while there is nothing to do


def serve(link: Link, run: Run, receive: Receive) -> int:
    """Asks for trials and runs them, until there are none, or `run` returns False."""
    while True:
        link.send("next")
        order = receive()
        if not order or not order["jobs"] or not run(order["jobs"]):
            return 0


class Reports(Progress):
    """Sends stages to the worker, at most one a second, and so shows that the child lives."""

    def __init__(self, link: Link, trial: str = "") -> None:
        super().__init__()
        self._link, self._of, self._sent = link, trial, 0.0

    def stage(self, what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        """See `Progress`."""
        if time.monotonic() - self._sent >= 1 or done == total:
            self._sent = time.monotonic()
            count = f" {done}/{total}" if total else ""
            self._link.send("stage", trial=self._of, text=f"{what}{count} {note}".strip())

    @contextmanager
    def for_trial(self, name: str) -> Iterator[Progress]:
        """See `Progress`."""
        yield Reports(self._link, name)


def run_batch(link: Link, session: "Session", jobs: Orders) -> bool:
    """Runs trials, and gives those back that do not run together with the first.

    Returns:
        False if an error was not the user's, which may have spoiled the session.
    """
    import jax
    from etils import epath

    from softprompt.config import from_dict
    from softprompt.trials.groups import run_group, trial_groups
    from softprompt.trials.sweep import record_failure

    errors: dict[str, Exception] = {}

    def failed(
        config: "ConfigDict", folder: "epath.Path", error: Exception, seconds: float
    ) -> "Row":
        row = record_failure(config, folder, error, seconds)
        errors[row["trial"]] = error
        return row

    configs = [from_dict(job["config"]) for job in jobs]
    group, width = [0], 1
    if not jobs[0]["fail"]:
        group, width = next(iter(trial_groups(session, configs)))
    positions = group[:width]
    if back := [job["trial"] for n, job in enumerate(jobs) if n not in positions]:
        # A group that is wholly run says nothing of how many more would have fitted.
        link.send("returned", trials=back, width=width if len(group) > width else 0)
    batch = [(configs[n], epath.Path(jobs[n]["folder"])) for n in positions]
    if why := jobs[0]["fail"]:
        rows = iter([(0, failed(*batch[0], UserError(why), 0.0))])
    else:
        rows = run_group(session, batch, len(batch), failed)
    clean = True
    for position, row in rows:
        error = errors.get(row["trial"])
        final = error is None or isinstance(error, UserError)
        clean = clean and final
        if not final and jax.process_count() > 1:
            return False  # a lost process is an error in all others
        trial, done = jobs[positions[position]]["trial"], row["status"] == "done"
        link.send("ended", trial=trial, done=done, error=row["error"], final=final)
    return clean


def orders_for_all(link: Link) -> Receive:
    """A function that returns the next order of the first process's worker, in each process.

    While there is none, all processes synchronise every 2 s and check whether to stop.
    """
    import jax

    from softprompt.distributed import from_first
    from softprompt.training.loop import stop_requested

    orders: queue.Queue[Message | None] = queue.Queue()

    def read() -> None:
        while (order := link.receive()) is not None:
            orders.put(order)
        orders.put(None)

    first = jax.process_index() == 0
    if first:
        threading.Thread(target=read, daemon=True, name="orders").start()

    def receive() -> Message | None:
        while stop_requested() is None:
            content = b""
            if first:
                with contextlib.suppress(queue.Empty):
                    content = json.dumps(orders.get(timeout=POLL_SECONDS)).encode()
            if content := from_first(content):
                order: Message | None = json.loads(content)
                return order
        raise SystemExit(interrupts.PREEMPTED)

    return receive


def ready(link: Link, distributed: str | None) -> bool:
    """Opens the devices, and tells the worker which they are; False if that fails."""
    from softprompt.distributed import NotJoined, start_jax

    try:
        start_jax(distributed, heartbeat=HEARTBEAT)
    except UserError as error:
        link.send("unable", error=str(error), later=isinstance(error, NotJoined))
        return False
    import jax

    from softprompt.config import base_config, resolve
    from softprompt.trials.engine.compiled import kind_of_programs
    from softprompt.trials.groups import most_on

    backend, devices = jax.default_backend(), jax.devices()
    link.send(
        "ready",
        backend=backend,
        dtype=resolve(base_config()).model.dtype,
        devices=f"{len(devices)} x {devices[0].device_kind}",
        chips=len(devices),
        width=most_on(backend) if jax.process_count() == 1 else 1,
        programs=kind_of_programs(),
    )
    return True


def main() -> int:
    """Runs the process."""
    link = parent()
    interrupts.exit_at_once()
    distributed = sys.argv[1] if len(sys.argv) > 2 else None
    if not ready(link, distributed):
        return 1
    from softprompt.trials.session import Session

    with Reports(link) as progress:
        session = Session(progress)
        if distributed is None:
            return serve(link, lambda jobs: run_batch(link, session, jobs), link.receive)

        def run(jobs: Orders) -> bool:
            if not run_batch(link, session, jobs):
                os._exit(1)  # so that the others end too, and all begin anew
            return True

        return serve(link, run, orders_for_all(link))


if __name__ == "__main__":
    sys.exit(main())
