"""Runs the application on a socket, with bounds on headers and connections."""

import asyncio
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from softprompt.errors import UserError
from softprompt.serving.http.guard import Guard

MOST_HEADER_BYTES = 2**14  # of a request's line and headers together
MOST_CONNECTIONS = 1024  # beyond which new requests are answered with 503
HEADER_SECONDS = 20.0  # in which a connection's next request has to come
KEEP_SECONDS = 20  # that a connection without a request stays open
CLOSING_SECONDS = 10  # that running requests have when the server is stopped
LEAST_KEY = 16  # characters


class BoundedProtocol(H11Protocol):
    """Closes a connection whose next request is not complete within `HEADER_SECONDS`."""

    def connection_made(self, transport: Any) -> None:
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._await_request()

    def on_response_complete(self) -> None:
        """Begins to wait for the next one."""
        super().on_response_complete()
        self._await_request()

    def _await_request(self) -> None:
        asyncio.get_running_loop().call_later(HEADER_SECONDS, self._close_idle, self.cycle)

    def _close_idle(self, cycle: Any) -> None:
        """Closes if nothing has come since `cycle`, the latest request."""
        idle = self.cycle is cycle and (cycle is None or cycle.response_complete)
        if idle and not self.transport.is_closing():
            self.transport.close()


def make_server(app: Guard) -> uvicorn.Server:
    """A server; `run(sockets=[listener])` serves until SIGINT or SIGTERM.

    Running requests then have `CLOSING_SECONDS`.
    """
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_level="warning",
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=KEEP_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        UserError: the address is not loopback's and there is no key, or it cannot be bound.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; allowed: 0 to {2**16 - 1}, 0 for any that is free")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not has_key and not ipaddress.ip_address(str(address[0])).is_loopback:
            raise UserError(f"--host is {host!r}; without --key-file allowed: loopback, 127.0.0.1")
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # clients wait, instead of being refused, until requests are taken
    except (OSError, ValueError) as error:
        raise UserError(f"cannot listen at {host!r}, port {port}: {error}") from error
    return listener


def read_key(file: str | os.PathLike[str]) -> str:
    """The key that a file holds.

    Raises:
        UserError: no such file, or the key is short or has other characters than printable ASCII.
    """
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(file)}: not readable as a key ({error})") from error
    if len(key) < LEAST_KEY or not key.isprintable() or " " in key:
        raise UserError(
            f"{os.fspath(file)}: a key of {len(key)} characters; allowed: at least {LEAST_KEY} "
            "printable ones without spaces"
        )
    return key
