"""Batches a step ahead, and what counts as waiting for one."""

import threading
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest

from softprompt.models.rows import Rows
from softprompt.training import prefetch as feed_module
from softprompt.training.prefetch import Prefetcher
from tests.contracts.examples import one_device


def batches(count, *, asked=None, gate=None):
    """Batches; `asked` is released for each that is begun, and `gate` lets them be made."""
    for number in range(count):
        if asked is not None:
            asked.release()
        if gate is not None:
            assert gate.wait(60)
        yield Rows(*[np.full((2, 3), number, np.int32)] * 3)


def test_the_next_batch_is_made_before_it_is_asked_for():
    """Mutation: `take` makes it. The second is asked for by the first `take`, and the third not."""
    asked = threading.Semaphore(0)
    with Prefetcher(one_device(), batches(3, asked=asked)) as prefetcher:
        for number in range(3):
            assert asked.acquire(timeout=5)
            if number == 0:
                assert not asked.acquire(timeout=0.1), "one ahead, no more"
            batch = prefetcher.take(None)
            assert set(batch.tokens.sharding.device_set) == set(one_device().devices.flat)
            assert np.unique(batch.tokens).tolist() == [number]
        with pytest.raises(StopIteration):
            prefetcher.take(None)


@pytest.mark.parametrize(
    ("busy", "late", "counted"), [(0, 3, 3), (9, 3, 0), (1.5, 3, 2), (2.5, 3, 1), (0.5, 1, 1)]
)
def test_devices_that_are_busy_do_not_wait(busy, late, counted, monkeypatch):
    """A batch that comes at `late`, and a step that ends at `busy`, by looks.

    Mutations: all of the loop's waiting is counted, or none of it; it is counted from the first
    look at idle devices; not if they fall idle within the look at which the batch is there.
    """
    now, gate = [0.0], threading.Event()

    def look(futures, seconds):
        now[0] += 1
        if now[0] < late:
            return wait(futures, 0)
        gate.set()
        return wait(futures, 60)

    monkeypatch.setattr(feed_module, "wait", look)
    monkeypatch.setattr(feed_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    running = SimpleNamespace(is_ready=lambda: now[0] >= busy)
    with Prefetcher(one_device(), batches(1, gate=gate)) as prefetcher:
        prefetcher.take({"loss": running})
    assert prefetcher.idle_seconds == counted


def test_a_source_that_fails_fails_the_loop():
    """Mutation: the thread's error is lost, and the loop ends as if there were no more."""

    def broken():
        yield from batches(1)
        raise OSError("disk")

    with Prefetcher(one_device(), broken()) as prefetcher:
        prefetcher.take(None)
        with pytest.raises(OSError, match="disk"):
            prefetcher.take(None)
