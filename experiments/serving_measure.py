"""What measurements of serving share: requests and their answers, and forms that take turns."""

import functools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt.evaluation.latency import Seconds, seconds
from softprompt.serving.engine import Engine
from softprompt.serving.requests import Finish, Request, Token


class Answers:
    """Collects the events of requests, with their times."""

    def __init__(self, engine: Engine, requests: Sequence[Request], pause: float = 0.0) -> None:
        self.events: list[list[Any]] = [[] for _ in requests]
        self._left, self._done = len(requests), threading.Event()
        random = np.random.default_rng(7)
        for n, request in enumerate(requests):
            engine.submit(request, functools.partial(self._take, n))
            time.sleep(random.exponential(pause) if pause else 0.0)

    def _take(self, n: int, event: Any) -> None:
        self.events[n].append((time.perf_counter(), event))
        if isinstance(event, Finish):
            assert event.reason in ("stop", "length"), event
            self._left -= 1
            if not self._left:
                self._done.set()

    def wait(self) -> list[list[Token]]:
        """The tokens of each request, when all have ended."""
        self._done.wait()
        return [[event for _, event in one if isinstance(event, Token)] for one in self.events]


def say(name: str, measured: str, target: str) -> None:
    """Prints a result beside its target."""
    print(f"{name:34} {measured:44} target: {target}", flush=True)


def in_turns(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Seconds]]:
    """The time of each form by the clock and by the processors; they run in turns."""
    timed = {name: functools.partial(seconds, run) for name, run in forms.items()}
    return take_turns(timed, rounds)


def take_turns(forms: Mapping[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """What each form returns; they run in turns, every second time in reverse."""
    times: dict[str, list[Seconds]] = {name: [] for name in forms}
    for turn in range(rounds):
        for name in list(forms)[:: 1 if turn % 2 else -1]:
            times[name].append(forms[name]())
            clock, processors = times[name][-1]
            print(f"turn {turn}: {name} {clock:.3f} s, processors {processors:.3f} s", flush=True)
    return times


def ratio(times: dict[str, list[Seconds]], over: str, under: str) -> str:
    """The medians of paired ratios, and by the clock all of them."""
    pairs = list(zip(times[over], times[under], strict=True))
    clock, processors = (sorted(a[n] / b[n] for a, b in pairs) for n in (0, 1))
    shown = " ".join(f"{one:.2f}" for one in clock)
    medians = f"{statistics.median(clock):.3f}, processors {statistics.median(processors):.3f}"
    return f"{medians} ({shown})"


def random_inputs(vocab: int, count: int, most: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random inputs of 1 to `most` tokens."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, most + 1, count)
    return [tuple(random.integers(5, vocab - 5, size).tolist()) for size in sizes]
