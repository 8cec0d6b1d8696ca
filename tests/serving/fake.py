"""An engine without a model: what the server's tests run on.

The tokens of a row are hashes of its task, of its seed if it has a temperature, and of what it has
so far.
"""

import hashlib
import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from softprompt.errors import UserError
from softprompt.pretrained.tokenizer import Tokenizer, byte_backend
from softprompt.serving.folders import NoTask
from softprompt.serving.requests import Busy, Finish, Request, TaskInfo, Token

LETTERS = range(3 + 97, 3 + 123)  # ids of a to z: a byte's token is its value plus 3
CONTEXT = 2048


class FakeEngine:
    """Answers with letters, a step of all rows at a time."""

    def __init__(self, tasks=(), *, most=256, pause=0.0):
        self.tokenizer = Tokenizer(byte_backend(sentinels=0), None, 1, False)
        self._names = {name: self._info(name, Path(name)) for name in tasks}
        self.most, self.pause = most, pause
        self.queue: queue.Queue = queue.Queue()
        self.running: dict[int, tuple[Request, list[int], Callable]] = {}
        self.cancelled, self.is_ready, self._next, self._open = 0, True, 0, True
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _info(self, name, folder):
        return TaskInfo(name, "prompt", "tiny", 20, 1000, 2000, 1.0, str(folder))

    def tasks(self):
        return list(self._names.values())

    def load(self, name, folder):
        if "bad" in (folder / "delta.safetensors").read_text():
            raise UserError(f"{folder}: bad delta")
        self._names[name] = self._info(name, folder)
        return self._names[name]

    def unload(self, name):
        if self._names.pop(name, None) is None:
            raise NoTask(f"no task {name!r}")

    def bos_ids(self, task):
        return ()

    def ready(self):
        return self.is_ready

    def stats(self):
        return {"rows": float(len(self.running)), "cancelled": float(self.cancelled)}

    def close(self):
        self._open = False
        self.thread.join()

    def predict(self, task, texts):
        return [
            {"text": text, "label": "good", "probabilities": {"good": 0.75, "bad": 0.25}}
            for text in texts
        ]

    def submit(self, request, on_event):
        if not request.tokens:
            raise UserError("the prompt has no tokens")
        if len(request.tokens) + request.max_new > CONTEXT:
            raise UserError(f"the prompt has {len(request.tokens)} tokens; allowed: {CONTEXT}")
        with self.lock:
            if len(self.running) >= self.most:
                raise Busy("the queue is full")
            self._next += 1
            self.running[self._next] = request, [], on_event
            return self._next

    def cancel(self, ticket):
        with self.lock:
            self.cancelled += self.running.pop(ticket, None) is not None

    def _run(self):
        while self._open:
            with self.lock:
                rows = list(self.running.items())
            for ticket, (request, made, on_event) in rows:
                self._step(ticket, request, made, on_event)
            time.sleep(self.pause or (0 if rows else 0.001))

    def _step(self, ticket, request, made, on_event):
        if not made and request.echo:
            for number, one in enumerate(request.tokens):
                logprob = math.nan if number == 0 or request.logprobs is None else -2.0
                on_event(Token(one, self.tokenizer.decode([one]), logprob, self._top(request, one)))
        text = self.tokenizer.decode(made)
        stopped = [text.index(stop) for stop in request.stop if stop in text]
        if stopped or len(made) >= request.max_new:
            with self.lock:
                if self.running.pop(ticket, None) is None:
                    return
            on_event(Finish("stop" if stopped else "length", len(request.tokens), len(made)))
            return
        made.append(self._choose(request, made))
        on_event(
            Token(made[-1], self.tokenizer.decode(made[-1:]), -1.0, self._top(request, made[-1]))
        )

    def _choose(self, request, made):
        seed = request.seed if request.temperature else None
        said = repr((request.task, request.tokens, made, seed)).encode()
        return LETTERS[int.from_bytes(hashlib.sha256(said).digest()[:4], "big") % len(LETTERS)]

    def _top(self, request, chosen):
        others = [one for one in LETTERS if one != chosen]
        return tuple((one, -3.0 - n) for n, one in enumerate(others[: request.logprobs or 0]))
