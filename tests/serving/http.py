"""Ways to send requests to the server: to its application, and over a socket."""

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path

import httpx2

from softprompt.serving.http.app import make_app
from softprompt.serving.http.server import listen, make_server
from softprompt.serving.http.settings import Settings
from tests.serving.fake import FakeEngine

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
KEY, ADMIN_KEY = "a key of requests".replace(" ", "-"), "a key of changes!".replace(" ", "-")


@contextlib.contextmanager
def fake_app(tasks=("short", "long"), *, root=Path("nowhere"), engine=None, **settings):
    """An application over a fake engine, and the engine."""
    engine = engine or FakeEngine(tasks)
    try:
        yield make_app(engine, Settings("tiny", root, **settings), chat_template=CHAT), engine
    finally:
        engine.close()


def call(app, method, path, **how):
    """One request to an application."""
    how.setdefault("headers", {})

    async def send():
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **how)

    return asyncio.run(send())


def post(app, path, body, **how):
    """One POST of JSON."""
    return call(app, "POST", path, json=body, **how)


def events(response):
    """The parts of a streamed answer."""
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def bearer(key):
    """The header with a key."""
    return {"authorization": f"Bearer {key}"}


@contextlib.contextmanager
def serving(app):
    """Serves an application on a free port of loopback; gives the port."""
    listener = listen("127.0.0.1", 0, has_key=False)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
