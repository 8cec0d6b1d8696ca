"""Checks on a new machine that a worker can work there: store, claims, devices and signals."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from softprompt.errors import UserError
from softprompt.trials.engine.link import Child
from softprompt.trials.engine.store import Store, open_store
from softprompt.trials.engine.worker import CHILD

WRITERS = 8
DEVICE_SECONDS = 300.0  # until devices must be open
LEAVE_SECONDS = 20.0  # until a child must have left after SIGTERM


def check(workdir: os.PathLike[str] | str) -> Iterator[tuple[str, str]]:
    """Yields what was checked and what came of it.

    Raises:
        UserError: a check failed; says what.
    """
    store = open_store(workdir)
    folder = f"check/{os.urandom(6).hex()}"
    yield "store", _timed(lambda: _check_store(store, folder))
    yield "claims", _timed(lambda: _check_claims(store, folder))
    for name in store.list(folder):
        store.delete(name)
    yield from _check_child()


def _timed(act: Callable[[], str]) -> str:
    began = time.monotonic()
    said = act()
    return f"{said} ({time.monotonic() - began:.2f} s)"


def _check_store(store: Store, folder: str) -> str:
    """Writes, lists, reads and deletes a file."""
    name = f"{folder}/file"
    for content in (b"1", b"2"):
        store.write(name, content)
        if store.read(name) != content or list(store.list(folder)) != [name]:
            raise UserError(f"the store does not return what was written to {name}")
    store.delete(name)
    if store.list(folder):
        raise UserError(f"the store still lists {name}, which was deleted")
    return "written, listed, read and deleted"


def _check_claims(store: Store, folder: str) -> str:
    """Lets several writers create one file."""
    barrier = threading.Barrier(WRITERS)

    def create(number: int) -> bool:
        barrier.wait()
        return store.create(f"{folder}/claim", str(number).encode())

    with ThreadPoolExecutor(WRITERS) as writers:
        won = sum(writers.map(create, range(WRITERS)))
    if won != 1:
        raise UserError(f"{won} of {WRITERS} writers created {folder}/claim; allowed: one")
    return f"one of {WRITERS} writers won"


def _check_child() -> Iterator[tuple[str, str]]:
    """Opens the devices in a child, then sends it SIGTERM."""
    child = Child(CHILD, {})
    try:
        message = child.receive(DEVICE_SECONDS)
        if message is None or message["kind"] != "ready":
            reason = message.get("error", "the process ended") if message else "no answer"
            raise UserError(f"no device can be opened: {reason}")
        yield "devices", f"{message['devices']} ({message['backend']})"
        began = time.monotonic()
        child.terminate()
        while message is None or message["kind"] != "exit":
            if time.monotonic() - began > LEAVE_SECONDS:
                raise UserError(f"the child goes on {LEAVE_SECONDS:g} s after SIGTERM")
            message = child.receive(1.0)
        yield "SIGTERM", f"left with {message['code']} after {time.monotonic() - began:.2f} s"
    finally:
        child.kill()
