"""The checks of every request: its key, its host, and limits on its body and its time."""

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.serving.http.errors import Refusal, dump, error_body, error_response
from softprompt.serving.http.metrics import Metrics
from softprompt.serving.http.settings import Settings

OPEN = ("/", "/health", "/ready")  # paths that need no key
CHANGING = ("PUT", "DELETE")  # methods that need the admin key
LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)
CLIENT_LEFT = 499  # a status in the metrics; no client receives it


class Guard:
    """Refuses, bounds and counts requests in front of an application.

    Access is checked on the same method and path that the application routes by. Every path that is
    not in `OPEN` needs a key, even one that does not exist. When a client disconnects, its request
    is cancelled.

    Args:
        app: the application.
        settings: keys and bounds.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, sent = time.monotonic(), _Sent(send)
        try:
            check_access(scope, self.settings)
            body = await read_body(receive, scope, self.settings)
            await self._run(scope, body, receive, sent)
        except Refusal as error:
            await sent.fail(error, scope, receive)
        finally:
            route = getattr(scope.get("endpoint"), "__name__", "other")
            self.metrics.requests.labels(route, str(sent.status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - began)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, sent: "_Sent") -> None:
        """Runs the application until it ends, the client leaves, or the time limit is reached.

        `CHANGING` methods have no time limit, since loading may compile programs.
        """
        running = asyncio.ensure_future(self.app(scope, _replay(body), sent))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait(
                {running, leaving},
                timeout=None if scope["method"] in CHANGING else self.settings.seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if running.done():
                await running
            elif not leaving.done():
                raise Refusal(f"not answered in {self.settings.seconds:g} s", 503, retry=False)
        finally:
            for task in (running, leaving):
                task.cancel()
            await asyncio.gather(running, leaving, return_exceptions=True)


class _Sent:
    """Sends an answer, and records whether it has started and ended."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = CLIENT_LEFT
        self._started = self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self._started = message["status"], True
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, error: Refusal, scope: Scope, receive: Receive) -> None:
        """Answers with an error; a stream that has begun gets it as its last event."""
        if not self._started:
            await error_response(error)(scope, receive, self)
        elif not self._ended:
            event = f"data: {dump(error_body(error))}\n\n".encode()
            await self({"type": "http.response.body", "body": event})


def check_access(scope: MutableMapping[str, Any], settings: Settings) -> None:
    """Checks a request's key. A server without keys checks the Host header instead.

    Raises:
        Refusal: the key is missing or wrong, changes are switched off, or the Host header is not
            loopback's (as in a DNS rebinding attack).
    """
    changing = scope["method"] in CHANGING
    if changing and not settings.admin_key:
        raise Refusal(f"{scope['method']} needs an admin key, and the server has none", 403)
    if not settings.key:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not LOOPBACK.fullmatch(hosts[0]):
            raise Refusal("the Host header is not loopback's; another one needs a key", 421)
    if not changing and (scope["path"] in OPEN or not settings.key):
        return
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    allowed = [settings.admin_key] if changing else [settings.key, settings.admin_key]
    expected = [f"Bearer {key}".encode() for key in allowed if key]
    matches = [hmac.compare_digest(given[0], one) for one in expected] if len(given) == 1 else []
    if not any(matches):
        which = "the admin key" if changing else "the key"
        raise Refusal(f"the Authorization header is not 'Bearer' and {which}", 401)


async def read_body(receive: Receive, scope: Scope, settings: Settings) -> bytes:
    """A request's body.

    Raises:
        Refusal: it is too large, comes too slowly, or is not declared as JSON. A browser sends JSON
            for another site's page only after a CORS preflight request, which is refused.
    """
    parts = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal("the client left", CLIENT_LEFT)
                parts += message.get("body", b"")
                if len(parts) > settings.body_bytes:
                    raise Refusal(f"the body is over {settings.body_bytes} bytes", 413)
                if not message.get("more_body", False):
                    break
    except TimeoutError as error:
        raise Refusal(f"the body did not come in {settings.body_seconds:g} s", 408) from error
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    kinds = [one.partition(b";")[0].strip().lower() for one in types]
    if scope["method"] == "POST" and kinds != [b"application/json"]:
        raise Refusal("Content-Type is not application/json", 415)
    return bytes(parts)


def _replay(body: bytes) -> Callable[[], Awaitable[Message]]:
    """A `receive` that gives a body that was read, and then waits."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive


async def _disconnect(receive: Receive) -> None:
    """Waits until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
