"""What `/metrics` shows, in Prometheus' text format."""

import asyncio
import functools
import re
import time
from collections.abc import Iterator

import jax
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from softprompt.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
DELAYS = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
PAUSE = 0.05  # seconds between two measurements of the event loop's delay


COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event
_compiled: list[float] = []  # seconds of each compilation since the first server of the process


@functools.cache
def watch_compilations() -> None:
    """Records JAX's compilations from now on; only the first call has an effect."""
    jax.monitoring.register_event_duration_secs_listener(_note)


def _note(event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILED:
        _compiled.append(duration_secs)


class Metrics:
    """The metrics of one server.

    Args:
        engine: whose `stats` are shown too.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "softprompt_requests", "Answered requests", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "softprompt_request_seconds",
            "Time to the end of an answer",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "softprompt_first_token_seconds",
            "Time from a row's submission to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "softprompt_tokens", "Tokens of finished rows", ["part"], registry=registry
        )
        self.loop_delay = Histogram(
            "softprompt_loop_delay_seconds",
            "How late the event loop runs what is due",
            buckets=DELAYS,
            registry=registry,
        )
        watch_compilations()
        registry.register(_Stats(engine))
        ProcessCollector(registry=registry)

    async def watch_loop(self) -> None:
        """Measures the event loop's delay until it is cancelled."""
        while True:
            due = time.monotonic() + PAUSE
            await asyncio.sleep(PAUSE)
            self.loop_delay.observe(max(0.0, time.monotonic() - due))


class _Stats(Collector):
    """The engine's own numbers, and the compilations."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """A gauge for each number."""
        about = "Programs compiled since the server was made"
        yield GaugeMetricFamily("softprompt_compilations", about, value=len(_compiled))
        for name, value in self._engine.stats().items():
            safe = re.sub(r"\W", "_", name, flags=re.ASCII)
            yield GaugeMetricFamily(f"softprompt_engine_{safe}", f"Engine: {name}", value=value)
