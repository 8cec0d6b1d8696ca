"""Locks a trial's folder, so that only one process trains in it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import jax
from etils import epath

from softprompt.errors import UserError

LOCK, HOLDER = ".lock", ".owner.json"


class Locked(UserError):
    """Another process is training in the folder, or holds the trial."""


@contextmanager
def locked_folder(folder: epath.PathLike) -> Iterator[None]:
    """Locks a folder for the duration of the block.

    The operating system releases the lock if the process dies. Buckets are not locked. Of several
    processes of one run, process 0 takes the lock.

    Raises:
        Locked: another process holds the lock; names it.
    """
    if "://" in os.fspath(folder) or jax.process_index():
        yield
        return
    path = Path(folder)
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise Locked(f"{path} is being trained by {_holder(path)}; wait for it to end") from error
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%c")}
        (path / HOLDER).write_text(json.dumps(holder))
        yield
    finally:
        for name in (HOLDER, LOCK):
            (path / name).unlink(missing_ok=True)
        lock.release()
        if new and not any(path.iterdir()):  # a failed command leaves no empty folder
            path.rmdir()


def _holder(path: Path) -> str:
    """A description of the process that holds the lock."""
    try:
        holder = json.loads((path / HOLDER).read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
