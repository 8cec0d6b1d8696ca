"""Batches a step ahead, and what counts as waiting for one."""

import threading
import time

import numpy as np
import pytest

from softprompt.training.feed import Feed
from tests.contracts.examples import one_device


def batches(count, *, seconds=0.0, asked=None):
    """Batches that take so long to make; `asked` is released for each that is begun."""
    for number in range(count):
        if asked is not None:
            asked.release()
        time.sleep(seconds)
        yield {"tokens_RT": np.full((2, 3), number, np.int32)}


class Running:
    """What a step returns that takes so long; for ever by default."""

    def __init__(self, seconds=1e9):
        self.end = time.monotonic() + seconds

    def is_ready(self):
        return time.monotonic() >= self.end


def test_the_next_batch_is_made_before_it_is_asked_for():
    """Mutation: `take` makes it. The second is asked for by the first `take`, and the third not."""
    asked = threading.Semaphore(0)
    with Feed(one_device(), batches(3, asked=asked)) as feed:
        for number in range(3):
            assert asked.acquire(timeout=5)
            if number == 0:
                assert not asked.acquire(timeout=0.1), "one ahead, no more"
            batch = feed.take(None)
            assert set(batch["tokens_RT"].sharding.device_set) == set(one_device().devices.flat)
            assert np.unique(batch["tokens_RT"]).tolist() == [number]
        with pytest.raises(StopIteration):
            feed.take(None)


def test_devices_that_are_busy_do_not_wait():
    """Mutation: all of the loop's waiting is counted, or none of it."""
    with Feed(one_device(), batches(4, seconds=0.4)) as feed:
        feed.take(None)
        idle = feed.waited
        assert idle > 0.2
        feed.take({"loss": Running()})
        assert feed.waited == idle
        began = time.monotonic()
        feed.take({"loss": Running(0.1)})
        assert 0.1 < feed.waited - idle <= time.monotonic() - began - 0.1
        idle = feed.waited
        time.sleep(0.6)  # the batch is there
        feed.take(None)
        assert feed.waited - idle < 0.1


def test_a_source_that_fails_fails_the_loop():
    """Mutation: the thread's error is lost, and the loop ends as if there were no more."""

    def broken():
        yield from batches(1)
        raise OSError("disk")

    with Feed(one_device(), broken()) as feed:
        feed.take(None)
        with pytest.raises(OSError, match="disk"):
            feed.take(None)
