"""What every request passes first: keys, hosts, and the bounds on body, headers and time."""

import asyncio
import json
import socket
import threading
import time

import httpx2
import jax
import jax.numpy as jnp
import pytest

from softprompt.errors import UserError
from softprompt.serving.http.app import make_app
from softprompt.serving.http.server import listen, read_key
from softprompt.serving.http.settings import Settings
from softprompt.serving.requests import Finish
from tests.serving.fake import FakeEngine
from tests.serving.http import ADMIN_KEY, KEY, bearer, call, fake_app, post, serving

ASK = {"model": "short", "prompt": "x"}
PATHS = ("/v1/models", "/metrics", "/v1/nothing", "/v1/completions", "/health/", "/healthy")


@pytest.mark.parametrize("given", [None, "", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", KEY])
def test_every_path_but_three_needs_the_key(given):
    """Breaks when a path is judged by its beginning: `path.startswith(OPEN)`."""
    with fake_app(key=KEY) as (app, _):
        headers = {} if given is None else {"authorization": given}
        for path in PATHS:
            response = call(app, "GET", path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        for free in ("/", "/health", "/ready"):
            assert call(app, "GET", free).status_code == 200
        assert call(app, "GET", "/v1/models", headers=bearer(KEY)).status_code == 200


def test_the_path_that_is_judged_is_the_path_that_is_routed():
    """Breaks when the path comes from a URL that is built of the Host header, where a "?" or "/"
    in the host moves the path: `urlsplit(f"http://{host}{path}").path` in `check_access`.
    """
    with fake_app(key=KEY) as (app, _), serving(app) as port:
        for host in ("localhost/health?", "localhost/health#", "a/../health?x="):
            request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            assert b" 401 " in raw(port, request.encode()).partition(b"\r\n")[0]
        for path in ("//health", "/v1/../health", "/health%2f..", "/%68ealth/", "http://a/health"):
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            assert b" 401 " in raw(port, request.encode()).partition(b"\r\n")[0], path


def test_two_keys_are_none():
    """Breaks when the first of two Authorization headers counts, whatever a proxy judged by."""
    with fake_app(key=KEY) as (app, _):
        headers = [*bearer(KEY).items(), *bearer("another").items()]
        assert call(app, "GET", "/v1/models", headers=headers).status_code == 401


def test_changes_need_the_admin_key(tmp_path):
    """Breaks when the key of requests, or none, may change tasks: drop `changing` in `allowed`."""
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "delta.safetensors").write_text("good")
    with fake_app(root=tmp_path) as (app, engine):
        for method in ("PUT", "DELETE"):
            response = call(app, method, "/v1/tasks/short")
            assert (response.status_code, len(engine.tasks())) == (403, 2)
    with fake_app(root=tmp_path, key=KEY, admin_key=ADMIN_KEY) as (app, engine):
        for headers in ({}, bearer(KEY)):
            assert call(app, "DELETE", "/v1/tasks/short", headers=headers).status_code == 401
        assert call(app, "DELETE", "/v1/tasks/short", headers=bearer(ADMIN_KEY)).status_code == 200
        assert [one.name for one in engine.tasks()] == ["long"]
        assert call(app, "PUT", "/v1/tasks/short", headers=bearer(ADMIN_KEY)).status_code == 200
        assert len(engine.tasks()) == 2
        assert call(app, "GET", "/v1/models", headers=bearer(ADMIN_KEY)).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1@evil", ""])
def test_without_a_key_only_loopbacks_names_are_answered(host):
    """Breaks when a site's name that points to 127.0.0.1 is answered: `match` for `fullmatch`."""
    with fake_app() as (app, _):
        assert call(app, "GET", "/v1/models", headers={"host": host}).status_code == 421
        for own in ("localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
            assert call(app, "GET", "/v1/models", headers={"host": own}).status_code == 200
    with fake_app(key=KEY) as (app, _):
        response = call(app, "GET", "/v1/models", headers={"host": host, **bearer(KEY)})
        assert response.status_code == 200


def test_a_form_of_another_site_is_refused():
    """Breaks when a body without JSON's type is read, which browsers send across sites unasked."""
    with fake_app() as (app, _):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            headers = {"content-type": kind}
            response = call(
                app, "POST", "/v1/completions", content=json.dumps(ASK), headers=headers
            )
            assert response.status_code == 415
        assert call(app, "OPTIONS", "/v1/completions").status_code == 405
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        response = call(app, "POST", "/v1/completions", content=json.dumps(ASK), headers=headers)
        assert response.status_code == 200


def test_a_large_body_is_refused_before_it_is_read():
    """Breaks when the whole body is kept first: check the length after the loop."""
    with fake_app(body_bytes=1000) as (app, _):
        seen = []

        async def parts():
            for number in range(100):
                seen.append(number)
                yield b"x" * 100

        headers = {"content-type": "application/json"}
        response = call(app, "POST", "/v1/completions", content=parts(), headers=headers)
        assert response.status_code == 413
        assert len(seen) < 20


def test_a_slow_body_is_refused():
    """Breaks when a body may take forever: drop `asyncio.timeout` in `read_body`."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
    with fake_app(body_seconds=0.2) as (app, _), serving(app) as port:
        assert b" 408 " in raw(port, head).partition(b"\r\n")[0]


def test_huge_headers_are_refused():
    """Breaks when headers are kept without a bound: drop `h11_max_incomplete_event_size`."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "
    with fake_app() as (app, _), serving(app) as port:
        answer = raw(port, head + b"x" * 2**17, patient=False)
        assert not answer or b" 400 " in answer.partition(b"\r\n")[0]
        assert b" 200 " in raw(port, head + b"x\r\nConnection: close\r\n\r\n")


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    """Breaks when a client may hold connections open: never call `_await_request`."""
    monkeypatch.setattr("softprompt.serving.http.server.HEADER_SECONDS", 0.2)
    keep = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with fake_app() as (app, _), serving(app) as port:
        began = time.monotonic()
        for sent in ((b"",), (b"GET /hea",), (keep, b"GET /h")):
            raw(port, *sent)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(stream):
    """Breaks when a row runs on for nobody: never cancel `running` in `Guard._run`."""
    engine = FakeEngine(["short"], pause=0.005)
    body = ASK | {"max_tokens": 512, "stream": stream, "prompt": ["a", "b"]}
    with fake_app(engine=engine) as (app, _), serving(app) as port:

        async def leave():
            url = f"http://127.0.0.1:{port}/v1/completions"
            async with httpx2.AsyncClient() as client:
                with pytest.raises((httpx2.TimeoutException, TimeoutError)):
                    async with asyncio.timeout(0.3):
                        await client.post(url, json=body)

        asyncio.run(leave())
        until = time.monotonic() + 2
        while engine.running and time.monotonic() < until:
            time.sleep(0.01)
        assert (engine.running, engine.cancelled) == ({}, 2)


def test_a_request_that_takes_too_long_is_ended():
    """Breaks when a request has no deadline, or its client asks again: drop `timeout`, or `retry`,
    in `Guard._run`.
    """
    engine = FakeEngine(["short"], pause=0.01)
    with fake_app(engine=engine, seconds=0.3) as (app, _):
        whole = post(app, "/v1/completions", ASK | {"max_tokens": 512})
        assert whole.status_code == 503
        assert whole.headers["x-should-retry"] == "false"  # else OpenAI's clients ask twice more
        assert "retry-after" not in whole.headers
        assert whole.json()["error"]["type"] == "server_error"
        streamed = post(app, "/v1/completions", ASK | {"max_tokens": 512, "stream": True})
        *parts, last = streamed.text.strip().split("\n\n")
        assert len(parts) > 5
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert engine.running == {}


def test_completions_do_not_wait_for_predictions():
    """Breaks when predictions, which load and compile, take the threads that tokenise: run them in
    `service.threads`.
    """
    go = threading.Event()
    with fake_app() as (app, engine):
        engine.predict = lambda task, texts: [go.wait(20)]

        async def ask():
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as one:
                path = "/v1/tasks/short/predict"
                predicting = [
                    asyncio.create_task(one.post(path, json={"inputs": ["x"]})) for _ in range(8)
                ]
                await asyncio.sleep(0.1)
                try:
                    answer = await asyncio.wait_for(one.post("/v1/completions", json=ASK), 5)
                finally:
                    go.set()
                return answer, await asyncio.gather(*predicting)

        answer, predicted = asyncio.run(ask())
        assert {one.status_code for one in (answer, *predicted)} == {200}


def test_an_error_of_the_engine_reaches_the_client():
    """Breaks when a failed row looks like a short answer: drop the check of `reason`."""
    engine = FakeEngine(["short"])
    engine._step = lambda ticket, request, made, on_event: fail(engine, ticket, on_event)
    with fake_app(engine=engine) as (app, _):
        response = post(app, "/v1/completions", ASK)
        assert (response.status_code, response.json()["error"]["message"]) == (500, "out of memory")
        streamed = post(app, "/v1/completions", ASK | {"stream": True})
        assert "out of memory" in streamed.text
        assert "[DONE]" not in streamed.text


def fail(engine, ticket, on_event):
    """A row that ends with an error."""
    engine.cancel(ticket)
    on_event(Finish("error", 1, 0, "out of memory"))


def test_metrics_count_requests_by_route_not_by_path():
    """Breaks when paths are labels, of which a client can make as many as it likes."""
    with fake_app() as (app, _):
        for number in range(5):
            call(app, "GET", f"/v1/models/{number}")
            call(app, "GET", f"/{number}")
        post(app, "/v1/completions", ASK | {"max_tokens": 7})
        lines = call(app, "GET", "/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("softprompt_requests_total")]
    assert 'softprompt_requests_total{route="show_model",status="404"} 5.0' in counts
    assert 'softprompt_requests_total{route="other",status="404"} 5.0' in counts
    assert len(counts) == 3
    assert 'softprompt_tokens_total{part="completion"} 7.0' in lines
    assert "softprompt_engine_rows 0.0" in lines


def test_the_first_token_is_a_generated_one():
    """Breaks when an echoed token is timed, or the end of a row that has none."""

    def counted(app, **body):
        post(app, "/v1/completions", ASK | body)
        lines = call(app, "GET", "/metrics").text.splitlines()
        name = "softprompt_first_token_seconds_count "
        return next(float(line.split()[1]) for line in lines if line.startswith(name))

    with fake_app() as (app, engine):
        assert counted(app, echo=True, max_tokens=0, prompt="abc") == 0
        assert counted(app, echo=True, max_tokens=2, prompt=["abc", "d"]) == 2
        engine._step = lambda ticket, request, made, on_event: fail(engine, ticket, on_event)
        assert counted(app) == 2


def test_metrics_count_compilations():
    """Breaks when JAX's event has another name: `COMPILED = "compile"`."""

    def count(app):
        lines = call(app, "GET", "/metrics").text.splitlines()
        return next(float(x.split()[1]) for x in lines if x.startswith("softprompt_compilations "))

    with fake_app() as (app, _):
        before = count(app)
        jax.jit(lambda x: x * 3 + 7)(jnp.ones(13)).block_until_ready()
        assert count(app) > before


def test_ready_waits_for_the_engine():
    """Breaks when `/ready` says yes though the engine's thread has ended."""
    with fake_app() as (app, engine):
        engine.is_ready = False
        assert call(app, "GET", "/ready").status_code == 503
        assert call(app, "GET", "/health").status_code == 200


def test_another_address_than_loopback_needs_a_key(tmp_path):
    """Breaks when a server without a key listens to everyone: drop the check in `listen`."""
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match="--key-file"):
            listen(host, 0, has_key=False)
    listen("0.0.0.0", 0, has_key=True).close()
    with pytest.raises(UserError, match="70000"):
        listen("127.0.0.1", 70000, has_key=False)


@pytest.mark.parametrize("text", ["", "short", "with spaces in the key", "\x00" * 20])
def test_weak_keys_are_refused(tmp_path, text):
    """Breaks when an empty file switches the key off: drop the check in `read_key`."""
    (tmp_path / "key").write_text(text)
    with pytest.raises(UserError, match="16"):
        read_key(tmp_path / "key")
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read_key(tmp_path / "key") == KEY


def test_the_application_closes_its_engine(tmp_path):
    """Breaks when the engine's thread outlives the server: drop `close` in the lifespan."""
    engine = FakeEngine(["short"])
    with serving(make_app(engine, Settings("tiny", tmp_path))):
        assert engine.thread.is_alive()
    assert not engine.thread.is_alive()
    assert not [one for one in threading.enumerate() if one.name.startswith("softprompt-http")]


def raw(port: int, *sent: bytes, patient: bool = True) -> bytes:
    """Sends bytes, a moment apart, and returns what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        found = b""
        try:
            for number, part in enumerate(sent):
                time.sleep(0.1 * bool(number))
                connection.sendall(part)
            while part := connection.recv(65536):
                found += part
        except ConnectionError:  # closed with bytes unread
            assert not patient
        return found
