"""Prefetches batches to the devices, and measures how long the devices wait for them."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from softprompt.data.rows import TrainBatch
from softprompt.training.sharding import put_batch

POLL = 0.001  # seconds between checks whether the devices are busy, while a batch is late


class Prefetcher:
    """Puts the next batch on the devices in a background thread, while they run a step.

    A context manager: its exit ends the thread.

    Attributes:
        idle_seconds: seconds in which the devices were idle because the next batch was late.
            Time in which they still run the previous step does not count. Each wait is counted
            from the last check that found them busy, so it is too long by at most `POLL`, never
            too short.
    """

    def __init__(self, mesh: jax.sharding.Mesh, batches: Iterator[TrainBatch]):
        self.idle_seconds = 0.0
        self._mesh, self._batches = mesh, batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._next = self._submit()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, running: Any) -> TrainBatch:
        """The next batch; `running` are outputs of the latest step, None if the devices are idle.

        Raises:
            StopIteration: there are no more batches.
        """
        if not self._next.done():
            self._wait(running)
        batch, self._next = self._next.result(), self._submit()
        if batch is None:
            raise StopIteration
        return batch

    def _submit(self) -> "Future[TrainBatch | None]":
        return self._thread.submit(self._load)

    def _load(self) -> TrainBatch | None:
        batch = next(self._batches, None)
        return None if batch is None else put_batch(self._mesh, batch)

    def _wait(self, running: Any) -> None:
        """Waits for the batch; the time since the devices were last busy is idle."""
        busy, loaded = time.monotonic(), False
        while not loaded:
            loaded = bool(wait([self._next], POLL).done)
            now = time.monotonic()  # before the check: busy devices were busy until now
            if not all(leaf.is_ready() for leaf in jax.tree.leaves(running)):
                busy = now
        self.idle_seconds += now - busy
