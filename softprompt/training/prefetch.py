"""Batches on the devices a step ahead of the loop, and the time for which devices lacked one."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import jax

from softprompt.data.rows import TrainBatch
from softprompt.training.sharding import put_batch

LOOK = 0.001  # seconds between looks at the devices, while a batch is waited for


class Feed:
    """Puts the next batch on the devices, in a thread of its own, while they take a step.

    Use it as a context manager: leaving it ends the thread.

    Attributes:
        waited: seconds for which the devices had no step to take since there was no batch for it.
            While a batch is late the devices may still be busy with the step before; that is no
            waiting. It counts from when they were last seen busy: up to `LOOK` too much at a time,
            never too little.
    """

    def __init__(self, mesh: jax.sharding.Mesh, batches: Iterator[TrainBatch]):
        self.waited = 0.0
        self._mesh, self._batches = mesh, batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._coming = self._ask()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, running: Any) -> TrainBatch:
        """The next batch.

        Args:
            running: what the step that was started last returns, or a part of it; None or an empty
                tree where the devices have nothing to do.

        Raises:
            StopIteration: there is none.
        """
        if not self._coming.done():
            self._wait(running)
        batch, self._coming = self._coming.result(), self._ask()
        if batch is None:
            raise StopIteration
        return batch

    def _ask(self) -> "Future[TrainBatch | None]":
        return self._thread.submit(self._load)

    def _load(self) -> TrainBatch | None:
        batch = next(self._batches, None)
        return None if batch is None else put_batch(self._mesh, batch)

    def _wait(self, running: Any) -> None:
        """Waits for the batch, and counts from when the devices were last seen busy."""
        busy, there = time.monotonic(), False
        while not there:
            there = bool(wait([self._coming], LOOK).done)
            now = time.monotonic()  # before the look: they are busy until then at least
            if not all(leaf.is_ready() for leaf in jax.tree.leaves(running)):
                busy = now
        self.waited += now - busy
