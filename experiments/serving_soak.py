"""Does the server keep its answers, its memory and its programs under load, swaps and disconnects?

Question: clients send completions, streams and lists without a pause; a fifth leave before the
end; tasks are loaded and unloaded all the while. Are there errors? Does an answer of a task that
is left alone ever change? Is a program compiled, or memory taken, after the first two minutes?

Prediction: 0 errors, the canary's tokens unchanged, no compilation after `/ready`, resident memory
within 1 % after minute 2, and the event loop late by at most 50 ms in 99 of 100 measurements.

This is a measurement, not a sweep of trials: it has no `sweep`, `table` and `figure`. The tasks are
prompts of random vectors, which cost what trained ones cost.

Command, from the repository root:
    python -m experiments.serving_soak --model smollm2-135m-instruct-q4 --minutes 10

Cost: 11 minutes on two x86 cores.

Expected: on `ladder/d0`, six minutes beside other work (about ten processes a core): 0 errors of
7,493 answers, one answer of the canary, no compilation, memory within 0.04 %, and an event loop
that 99 of 100 times is late by 50 to 100 ms, where a free core was predicted.
"""

import argparse
import asyncio
import collections
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pandas as pd

from experiments.serving_tasks import make_task
from softprompt.analysis.tables import to_markdown
from softprompt.pretrained.loading import load_model

LENGTHS = (1, 5, 20, 20, 100, 100)  # of the tasks' prompts
CANARY = "task-0"
SAMPLE_SECONDS = 5.0
SETTLED_SECONDS = 120.0  # after which memory must stay
LEAVES = 0.2  # share of the clients that disconnect before the end


def make_tasks(root: Path, model: str) -> list[str]:
    """Writes a task a length under a root, and returns their names."""
    loaded = load_model(model)
    names = [f"task-{number}" for number in range(len(LENGTHS))]
    for seed, (name, length) in enumerate(zip(names, LENGTHS, strict=True)):
        make_task(root / name, loaded, seed=seed, length=length)
    return names


@contextmanager
def server(root: Path, model: str, key: str, *options: str) -> Iterator[str]:
    """Runs `softprompt serve` in a process of its own until the block ends.

    Gives its address, when it is ready.
    """
    (root / "key").write_text(key)
    command = [sys.executable, "-m", "softprompt", "serve", str(root), "--model", model]
    command += ["--port", "0", "--admin-key-file", str(root / "key"), *options]
    log = root / "log"
    with open(log, "w") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            while not (found := re.search(r"http://\S+", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended: {log.read_text()[-500:]}")
                time.sleep(0.5)
            while not is_ready(found[0]):
                time.sleep(0.1)
            yield found[0]
        finally:
            process.terminate()


def is_ready(address: str) -> bool:
    """Whether the server answers that it is ready; its address is said before it listens."""
    try:
        return httpx2.get(f"{address}/ready").status_code == 200
    except httpx2.TransportError:
        return False


class Soak:
    """Loads a server and writes down what it sees.

    Args:
        client: of the server.
        names: of the tasks.
        key: the admin key.
        until: when to stop, on the monotonic clock.
    """

    def __init__(
        self, client: httpx2.AsyncClient, names: list[str], *, key: str, until: float
    ) -> None:
        self.client, self.names, self.until = client, names, until
        self.admin = {"authorization": f"Bearer {key}"}
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: list[str] = []
        self.canaries: set[str] = set()
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.random = random.Random(0)

    async def run(self, clients: int) -> None:
        """Runs clients, swaps, the canary and the sampling together."""
        loops = [self.ask] * clients + [self.swap, self.canary, self.sample]
        await asyncio.gather(*(self._repeat(one) for one in loops))

    async def _repeat(self, action: Any) -> None:
        while time.monotonic() < self.until:
            try:
                await action()
            except httpx2.HTTPError as error:
                self.errors.append(repr(error))

    async def ask(self) -> None:
        """A random request; some clients leave before the end."""
        draw, name = self.random, self.random.choice(self.names)
        prompt = " ".join(
            draw.choices(("the", "film", "was", "a", "quiet", "old"), k=draw.randint(2, 40))
        )
        body = {"model": name, "prompt": prompt, "max_tokens": draw.randint(1, 48)}
        body |= {"stream": True} if draw.random() < 0.5 else {}
        body |= {"prompt": [prompt, prompt[:20]]} if draw.random() < 0.2 else {}
        body |= {"temperature": 0.0} if draw.random() < 0.5 else {}
        patience = draw.uniform(0.01, 1.0) if draw.random() < LEAVES else 120.0
        try:
            async with asyncio.timeout(patience):
                response = await self.client.post("/v1/completions", json=body)
        except TimeoutError:
            self.counts["left" if patience < 120 else "timeout"] += 1
            return
        kind = "stream" if body.get("stream") else "whole"
        self.note(kind, response, busy=(404, 429))  # its task may be unloaded, the queue full

    async def swap(self) -> None:
        """Loads a task again or unloads and loads it; the canary's is left alone."""
        path = f"/v1/tasks/{self.random.choice([n for n in self.names if n != CANARY])}"
        if self.random.random() < 0.3:
            self.note("unload", await self.client.delete(path, headers=self.admin), busy=(404,))
        self.note("load", await self.client.put(path, headers=self.admin))
        await asyncio.sleep(self.random.uniform(0.1, 1.0))

    async def canary(self) -> None:
        """The same greedy request again and again."""
        body = {"model": CANARY, "prompt": "A quiet film", "temperature": 0, "max_tokens": 32}
        response = await self.client.post("/v1/completions", json=body)
        self.note("canary", response, busy=(429,))
        if response.status_code == 200:
            self.canaries.add(response.json()["choices"][0]["text"])
        await asyncio.sleep(0.5)

    async def sample(self) -> None:
        """The server's metrics."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        self.samples.append((time.monotonic(), {name: float(value) for name, value in pairs}))
        await asyncio.sleep(SAMPLE_SECONDS)

    def note(self, kind: str, response: httpx2.Response, busy: tuple[int, ...] = ()) -> None:
        """Counts an answer; any other status than 200 and those of `busy` is an error."""
        failed = response.status_code == 200 and '"error"' in response.text[-300:]
        if failed or response.status_code not in (200, *busy):
            self.errors.append(f"{kind}: {response.status_code} {response.text[-200:]}")
        self.counts[kind if response.status_code == 200 else str(response.status_code)] += 1


def late(samples: list[tuple[float, dict[str, float]]], share: float) -> float:
    """The least bound of a histogram that a share of the event loop's delays keeps, in seconds."""
    name = "softprompt_loop_delay_seconds_bucket"
    counts = {float(key.split('"')[1]): n for key, n in samples[-1][1].items() if name in key}
    total = max(counts.values())
    return min(bound for bound, count in counts.items() if count >= share * total)


def report(soak: Soak, began: float) -> list[dict[str, object]]:
    """What was predicted and what was measured."""
    first, last = soak.samples[0][1], soak.samples[-1][1]
    memory = [
        values["process_resident_memory_bytes"]
        for when, values in soak.samples
        if when - began >= min(SETTLED_SECONDS, (soak.until - began) / 2)
    ]
    compiled = [values["softprompt_compilations"] for values in (first, last)]
    rows = [
        ("errors", "0", str(len(soak.errors))),
        ("answers of the canary", "1", str(len(soak.canaries))),
        ("compilations after ready", "0", f"{compiled[1] - compiled[0]:.0f}"),
        ("memory after minute 2", "within 1 %", f"{max(memory) / min(memory) - 1:.2%}"),
        ("event loop late, p99", "50 ms", f"{late(soak.samples, 0.99) * 1000:.1f} ms"),
    ]
    return [dict(zip(("what", "target", "measured"), row, strict=True)) for row in rows]


async def measure(address: str, names: list[str], said: argparse.Namespace, key: str) -> None:
    """Loads the server and prints the report."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=address, timeout=150, limits=limits) as client:
        began = time.monotonic()
        soak = Soak(client, names, key=key, until=began + 60 * said.minutes)
        await soak.run(said.clients)
    print(f"{said.model}, {said.clients} clients, {said.minutes:g} minutes: {dict(soak.counts)}")
    print(to_markdown(pd.DataFrame(report(soak, began), dtype=object)), end="")
    for error in soak.errors[:10]:
        print(error)


def main() -> None:
    """Serves random prompts, loads the server, and prints what was measured."""
    parser = argparse.ArgumentParser(description="Does the server hold under load?")
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    said, key = parser.parse_args(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        names = make_tasks(Path(folder), said.model)
        with server(Path(folder), said.model, key) as address:
            asyncio.run(measure(address, names, said, key))


if __name__ == "__main__":
    main()
