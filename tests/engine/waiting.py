"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def wait_for(reached: Callable[[], object], what: str, seconds: float) -> None:
    """Waits until a function returns something true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"no {what} after {seconds} s"
        time.sleep(0.2)
