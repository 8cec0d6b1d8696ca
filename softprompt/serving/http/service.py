"""What the endpoints share: the engine, the settings, and threads for calls that block."""

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

from softprompt.serving.engine import Engine
from softprompt.serving.http.errors import BUSY, Refusal
from softprompt.serving.http.metrics import Metrics
from softprompt.serving.http.settings import Settings

MOST_WAITING = 64  # calls that wait for a thread or run in one


class Threads:
    """Runs blocking calls in `count` threads beside the event loop; refuses too many at once."""

    def __init__(self, count: int) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(count, "softprompt-http")
        self._waiting = 0

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call.

        Raises:
            Refusal: `MOST_WAITING` calls wait.
        """
        if self._waiting >= MOST_WAITING:
            raise Refusal("too many requests wait; try again", BUSY)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, function, *arguments)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Ends the threads without waiting for them."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Service:
    """A running server's parts.

    Attributes:
        engine: runs the rows.
        settings: of the server.
        metrics: of the server.
        threads: for calls that take milliseconds, such as tokenisation.
        loading: for calls that may load and compile: loading, unloading and predictions.
        chat_template: the model's; "" if it has none.
    """

    engine: Engine
    settings: Settings
    metrics: Metrics
    threads: Threads
    loading: Threads
    chat_template: str

    def resolve(self, name: str, user: str, field: str) -> str:
        """The task that a name stands for: "" is the base model, an alias gives the user's arm.

        Raises:
            Refusal: no task of this name is loaded.
        """
        alias = self.settings.aliases.get(name)
        task = alias.arm(user) if alias else name
        if task == self.settings.base:
            return ""
        if all(task != one.name for one in self.engine.tasks()):
            raise Refusal(f"{field}: no task {task!r} is loaded; /v1/models lists them", 404, field)
        return task

    async def encode(self, task: str, texts: list[str]) -> list[list[int]]:
        """The token ids of texts, with BOS where the task's texts begin with it."""
        return await self.threads.run(self._encode, task, texts)

    def _encode(self, task: str, texts: list[str]) -> list[list[int]]:
        opening = self.engine.bos_ids(task)
        return [[*opening, *ids] for ids in self.engine.tokenizer.encode_batch(texts)]
