"""Continuous batching: one thread runs the rows of all tasks; requests join and leave at any step.

A pool's programs are compiled before a task of its kind can be used, so that no completion waits
for the compiler. `predict` compiles at its first request.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt.console import Progress
from softprompt.errors import UserError, unknown
from softprompt.pretrained.loading import Loaded, load_model
from softprompt.serving.bank import Bank, LoadedTask
from softprompt.serving.batching import Batcher, Ticket
from softprompt.serving.folders import NoTask
from softprompt.serving.placement import Sizes
from softprompt.serving.predictions import Predictions
from softprompt.serving.requests import Busy, OnEvent, Request, Stopped, TaskInfo
from softprompt.serving.text import TextStream
from softprompt.serving.validation import check_request

SIZES = Sizes()


class Engine:
    """Generates for the tasks of one frozen model. Its methods may be called from any thread.

    Args:
        model: its name, see `load_model`; or the loaded model.
        dtype: of the weights and the computation.
        sizes: of the pools; inputs and outputs may be no longer than the model's context.
        queue: the most requests that wait.
        progress: the display.

    Attributes:
        tokenizer: the model's.

    Raises:
        UserError: see `load_model`; the model is an encoder-decoder; or inputs are too long, see
            `padded`.
    """

    def __init__(
        self,
        model: str | Loaded,
        *,
        dtype: str = "float32",
        sizes: Sizes = SIZES,
        queue: int = 256,
        progress: Progress | None = None,
    ) -> None:
        loaded = load_model(model, dtype=dtype) if isinstance(model, str) else model
        self._bank, self._most = Bank(loaded), queue
        self._sizes = sizes = sizes.within(self._bank.model.config.context_length)
        self.tokenizer = loaded.tokenizer
        self._predictions = Predictions(loaded, progress or Progress())
        self._batcher = Batcher(self._bank, sizes)
        self._batcher.pools(self._bank.base)
        self._tasks = {"": self._bank.base}
        self._queue: deque[Ticket] = deque()
        self._wake, self._loading = threading.Condition(), threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Queues a request. `on_event` is called in the engine's thread and must not wait.

        Raises:
            UserError: see `check`.
            Busy: the queue is full.
            Stopped: the engine has stopped.
        """
        task = self.check(request)
        stream = TextStream(self.tokenizer, request.stop, before=request.tokens)
        ticket = Ticket(request, on_event, task, stream)
        with self._wake:
            if self._closed:
                raise Stopped("the engine has stopped")
            if len(self._queue) >= self._most:
                raise Busy(f"{len(self._queue)} requests wait; allowed: {self._most}")
            self._queue.append(ticket)
            self._wake.notify()
        return ticket

    def check(self, request: Request) -> LoadedTask:
        """Checks a request without submitting it; returns its task.

        Raises:
            NoTask: its task is not loaded.
            UserError: a value is not allowed.
        """
        task = self._task(request.task)
        config, sizes = self._bank.model.config, self._sizes
        check_request(request, config, sizes, context=task.info.length)
        return task

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request, with the event `Finish("cancelled", ...)`; none if it has finished."""
        with self._wake:
            ticket.cancelled = True
            self._wake.notify()

    def tasks(self) -> list[TaskInfo]:
        """The loaded tasks, without the base model."""
        return [task.info for name, task in sorted(self._tasks.items()) if name]

    def bos_ids(self, task: str) -> tuple[int, ...]:
        """What the inputs of a task begin with: BOS or nothing.

        Raises:
            NoTask: the task is not loaded.
        """
        bos_id = self.tokenizer.bos_id
        return (bos_id,) if self._task(task).bos and bos_id is not None else ()

    def load(self, name: str, folder: Path) -> TaskInfo:
        """Loads a task, or a new version of it; rows that run finish with the old one.

        A trial with several prompts gives several tasks, see `Bank.read`; the first is returned. If
        it fails, nothing has changed.

        Raises:
            UserError: see `Bank.read`; or the name is "".
        """
        if not name:
            raise UserError("a task's name is ''; allowed: a name, since '' is the base model")
        with self._loading:
            found = self._bank.read(name, Path(folder))
            for task in found:
                self._batcher.pools(task)
            with self._wake:
                self._tasks = self._without(name) | {task.info.name: task for task in found}
        return found[0].info

    def unload(self, name: str) -> None:
        """Forgets a task; its rows finish.

        Raises:
            NoTask: it is not loaded.
        """
        with self._loading, self._wake:
            left = self._without(name)
            if not name or len(left) == len(self._tasks):
                raise self._no_task(name)
            self._tasks = left

    def ready(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._closed

    def stats(self) -> dict[str, float]:
        """Numbers of requests waiting and running, of tokens and steps, and bytes of the cache."""
        now = {"queue": len(self._queue), "running": len(self._batcher.running)}
        return {**now, **self._batcher.counts, "cache_bytes": self._bank.bytes}

    def predict(self, task: str, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Answers texts with a trial's own template, as `softprompt predict` does.

        Raises:
            NoTask: the task is not loaded.
            UserError: it has no template; see `Predictor.predict`.
        """
        return self._predictions(self._task(task), texts)

    def close(self) -> None:
        """Ends the thread; requests in the engine are cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _task(self, name: str) -> LoadedTask:
        if (task := self._tasks.get(name)) is None:
            raise self._no_task(name)
        return task

    def _no_task(self, name: str) -> NoTask:
        return NoTask(str(unknown("task", name, [info.name for info in self.tasks()])))

    def _without(self, name: str) -> dict[str, LoadedTask]:
        """The tasks without the one of this name, or without those of the trial of this name."""
        return {
            one: task
            for one, task in self._tasks.items()
            if one != name and not (task.member and one == f"{name}:{task.member}")
        }

    def _run(self) -> None:
        """The thread: joins waiting requests and steps all pools with rows, until it is closed."""
        batcher, waiting = self._batcher, list[Ticket]()
        reason, error = "cancelled", ""
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closed or self._queue or batcher.running)
                    waiting = list(self._queue)
                if self._closed:
                    break
                left = batcher.join(waiting)
                with self._wake:
                    came = list(self._queue)[len(waiting) :]
                    self._queue = deque([*left, *came])
                batcher.step()
        except Exception:  # its text is for the log, not for clients
            logging.exception("the engine's thread ends")
            reason, error = "error", "the engine has stopped; its log says why"
        with self._wake:
            self._closed, rest = True, [*batcher.running, *self._queue]
            self._queue.clear()
        for ticket in rest:
            batcher.finish(ticket, reason, error)
