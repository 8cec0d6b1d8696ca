"""Random bodies, headers, names and files: every one gets an answer, and none is a 5xx."""

import asyncio
import json
import random
import time

import httpx2
import pytest

from tests.serving.fake import FakeEngine
from tests.serving.http import ADMIN_KEY, bearer, call, fake_app, serving

PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/tasks/short/predict", "/v1/outcomes"),
    *("/v1/tasks/short", "/v1/models", "/v1/models/x", "/", "/health", "/metrics", "/v1/tasks/"),
)
FIELDS = (
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop"),
    *("stream", "stream_options", "logprobs", "top_logprobs", "echo", "user", "n", "logit_bias"),
    *("inputs", "alias", "arm", "value", "role", "content", "tools", "max_completion_tokens", "\0"),
)
TEXTS = ("", "short", "x", "é", "\0", "\ud800", "‮", "../..", "a" * 5000, "<|im_start|>", "{{7*7}}")
NUMBERS = (0, 1, -1, 2, 5, 1e308, -0.0, 0.5, 2**31, 2**63, 10**400, True, False, None)
CANARY = {"model": "long", "prompt": "canary", "temperature": 0, "max_tokens": 24}


def value(rng, depth=0):
    """A random JSON value."""
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind < 4:
        return rng.choice(NUMBERS)
    several = range(rng.choice((0, 1, 2, 3, 70)))
    if kind == 4:
        return [value(rng, depth + 1) for _ in several]
    return {rng.choice(FIELDS): value(rng, depth + 1) for _ in several}


def body(rng):
    """A random body: JSON near a good request, any JSON, deep JSON, a cut one, or bytes."""
    kind = rng.randrange(8)
    if kind < 4:
        near = {"model": "short", "prompt": "x", "max_tokens": 3}
        near |= {rng.choice(FIELDS): value(rng) for _ in range(rng.randrange(4))}
        return json.dumps(near).encode()
    if kind == 4:
        return json.dumps(value(rng)).encode()
    if kind == 5:
        opening = rng.choice((b"[", b'{"prompt":', b'{"model":"short","prompt":[', b'{"a":'))
        return opening * rng.choice((10, 5000, 100_000))
    if kind == 6:
        cut = json.dumps(value(rng)).encode()[: rng.randrange(40)]
        return cut + rng.choice((b"", b"NaN", b"1e999"))
    return rng.randbytes(rng.choice((0, 1, 100, 20_000, 2**20 + 1)))


def headers(rng):
    """Random headers; most declare JSON, some hold a key."""
    found = [("content-type", rng.choice(("application/json",) * 8 + ("text/plain", "x")))]
    for name in rng.sample(("authorization", "x-a", "transfer", "accept", "cookie", "range"), 2):
        found.append((name, rng.choice(("", "Bearer", "Bearer x", "a" * 3000, "é", "bytes=0-"))))
    return found + list(bearer(ADMIN_KEY).items()) * (rng.random() < 0.3)


def request(client, rng):
    """A random request."""
    path = rng.choice(PATHS)
    if rng.random() < 0.15:
        path += rng.choice(("/", "/..", "/%2e%2e%2f", "%00", "?x=1", "/é", "/" + "a" * 2000, "//"))
    usual = "POST" if path in PATHS[:4] else "GET"
    method = rng.choice((usual,) * 8 + ("PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"))
    encoded = [(name, text.encode()) for name, text in headers(rng)]
    return client.build_request(method, path, content=body(rng), headers=encoded)


def write_delta(rng, root):
    """Puts bytes, a folder, or nothing where the task's file is."""
    file = root / "short" / "delta.safetensors"
    if rng.random() < 0.02:
        file.write_bytes(rng.choice((b"good", b"bad", b"")))


HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LINES = (
    *("Content-Length: -1", "Content-Length: 9999999999999999999999", "Content-Length: 2, 3"),
    *("Content-Length: 2\r\nContent-Length: 3", "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
    *("Transfer-Encoding: gzip", "Expect: 100-continue", "Upgrade: websocket", "X" * 20_000, ": x"),
    *("Host: evil", "X: \0", "Connection: Upgrade\r\nUpgrade: h2c", "Transfer-Encoding: chunked"),
)


async def raw_status(port, rng):
    """The status of a request that no client library sends; 0 where the server only closes."""
    lines = "\r\n".join(rng.sample(LINES, rng.randrange(1, 3)))
    whole = f"{HEAD}{lines}\r\n\r\n{{}}".encode()
    sent = rng.choice((whole, whole, whole[: rng.randrange(len(whole))], rng.randbytes(300)))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        writer.write_eof()
        line = await asyncio.wait_for(reader.readline(), 20)
    except ConnectionError:
        line = b""
    finally:
        writer.close()
    return int(line.split()[1]) if line else 0


async def fuzz(port, root, count, seed):
    """Sends random requests, and returns statuses and what the canary answered before and after."""
    rng, statuses = random.Random(seed), {}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        before = (await client.post("/v1/completions", json=CANARY)).json()["choices"]
        for number in range(count):
            write_delta(rng, root)
            if rng.random() < 0.1:
                status = await raw_status(port, rng)
            else:
                sent = request(client, rng)
                try:
                    status = (await client.send(sent)).status_code
                except (httpx2.NetworkError, httpx2.RemoteProtocolError):
                    status = 0  # the server closed while a body was sent that it had refused
            assert status < 500, (seed, number)
            statuses[status] = statuses.get(status, 0) + 1
        after = (await client.post("/v1/completions", json=CANARY)).json()["choices"]
    return statuses, before, after


HOSTILE = (
    *(rb"\ud800", rb'{"model":"short","prompt":"\ud800"}', b"[" * 100_000, b"NaN", b"", b"\xff"),
    *(b'{"model":"short","prompt":"x","temperature":1e999}', b'{"model":"short","prompt":[1e3]}'),
    *(b'{"model":"short","prompt":' + b"[" * 100_000, b"1" * 100_000, b'{"a":' * 100_000, b"null"),
    rb'{"model":"short","prompt":"x","user":"\ud800"}',
)


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_bodies_that_break_parsers_are_refused(number):
    """Breaks when a lone surrogate reaches the tokenizer: drop the check in `parse_body`."""
    with fake_app() as (app, _):
        headers = {"content-type": "application/json"}
        response = call(app, "POST", "/v1/completions", content=HOSTILE[number], headers=headers)
    assert response.status_code == 400


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.long)])
def test_random_requests_never_break_the_server(count, tmp_path):
    """Breaks when an input raises something else than a `UserError`: drop `RecursionError` in
    `parse_body`.
    """
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "delta.safetensors").write_text("good")
    engine, began = FakeEngine(["short", "long"]), time.monotonic()
    with fake_app(root=tmp_path, engine=engine, admin_key=ADMIN_KEY) as (app, _):
        with serving(app) as port:
            statuses, before, after = asyncio.run(fuzz(port, tmp_path, count, seed=count))
        print(f"{count} requests in {time.monotonic() - began:.1f} s: {statuses}")
        assert engine.running == {}
    assert before == after
    assert statuses[200] > count / 50
    assert statuses.get(0, 0) < count / 10
