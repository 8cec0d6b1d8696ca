"""The rows of one HTTP request in the engine, and its streamed answer."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from softprompt.serving.engine import Engine, Ticket
from softprompt.serving.http.answers import TextAnswer
from softprompt.serving.http.errors import Refusal, dump, error_body
from softprompt.serving.http.metrics import Metrics
from softprompt.serving.requests import Finish, Request, Token

Event = tuple[int, Token | Finish]


class Rows:
    """Submits requests as rows; their events arrive from the engine's thread.

    Args:
        engine: that runs the rows.
        requests: a row each.
        metrics: where times and tokens are counted.

    Raises:
        UserError: the engine refuses a request. Rows submitted before it are freed.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._began = time.monotonic()
        self._tickets: list[Ticket] = []
        self.count = len(requests)
        self._to_echo = [len(one.tokens) if one.echo else 0 for one in requests]
        try:
            for index, request in enumerate(requests):
                self._tickets.append(engine.submit(request, functools.partial(self._put, index)))
        except BaseException:
            self.free()
            raise

    def _put(self, index: int, event: Token | Finish) -> None:
        """Called by the engine's thread; a loop that is closed has no reader."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def free(self) -> None:
        """Frees the rows that still run."""
        for ticket in self._tickets:
            self._engine.cancel(ticket)

    async def events(self) -> AsyncIterator[Event]:
        """The events of all rows until each has finished.

        Raises:
            Refusal: a row ended with an error.
        """
        running = self.count
        while running:
            index, event = await self._events.get()
            if isinstance(event, Token):
                if self._to_echo[index] == 0:  # the first that was generated
                    self._metrics.first_token.observe(time.monotonic() - self._began)
                self._to_echo[index] -= 1
            else:
                running -= 1
                if event.reason == "error":
                    raise Refusal(event.error, 500)
                if event.reason == "cancelled":
                    raise Refusal("the server stops", 503)
                self._metrics.tokens.labels("prompt").inc(event.prompt_tokens)
                self._metrics.tokens.labels("completion").inc(event.completion_tokens)
            yield index, event

    async def collect(self) -> list[tuple[list[Token], Finish]]:
        """All tokens and the end of each row; the rows are freed."""
        tokens: list[list[Token]] = [[] for _ in range(self.count)]
        ends: dict[int, Finish] = {}
        try:
            async for index, event in self.events():
                if isinstance(event, Finish):
                    ends[index] = event
                else:
                    tokens[index].append(event)
        finally:
            self.free()
        return [(tokens[index], ends[index]) for index in range(self.count)]


class Stream(Response):
    """Sends the rows' tokens as server-sent events.

    Args:
        rows: running rows; they are freed when the stream ends for any reason.
        answer: makes the events.
        usage: whether the stream ends with an event that counts the tokens.
    """

    def __init__(self, rows: Rows, answer: TextAnswer, *, usage: bool) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._rows, self._answer, self._usage = rows, answer, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            headers = [
                (name, value) for name, value in self.raw_headers if name[:9] != b"content-l"
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for text in self._lines():
                body = f"data: {text}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._rows.free()

    async def _lines(self) -> AsyncIterator[str]:
        """The data of each event."""
        answer, finishes = self._answer, list[Finish]()
        usage = {"usage": None} if self._usage else {}  # as OpenAI's parts before the last
        for part in answer.openings(self._rows.count):
            yield dump(part | usage)
        try:
            async for index, event in self._rows.events():
                if isinstance(event, Finish):
                    finishes.append(event)
                    yield dump(answer.part(index, [], event.reason) | usage)
                else:
                    yield dump(answer.part(index, [event], None) | usage)
        except Refusal as error:
            yield dump(error_body(error))
            return
        if self._usage:
            yield dump(answer.end(finishes))
        yield "[DONE]"
