"""The connection of a worker and its child: JSON objects, one per line, over a socket."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]


class Link:
    """One end of a connection.

    Args:
        end: the socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._file = end.makefile("rwb")
        self._lock = threading.Lock()
        end.close()  # the file keeps it open

    def send(self, kind: str, **facts: Any) -> None:
        """Sends a message; one to a process that is gone is dropped."""
        try:
            with self._lock:
                self._file.write(json.dumps({"kind": kind, **facts}).encode() + b"\n")
                self._file.flush()
        except OSError:
            pass

    def receive(self) -> Message | None:
        """The next message; None once the other end is gone."""
        try:
            line = self._file.readline()
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None


class Child:
    """A child process whose messages arrive in a queue.

    Args:
        command: the process; the number of its end of the connection is appended.
        environment: added to this process's.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is for the worker, which lets the child save
        )
        theirs.close()
        self._link = Link(ours)
        self._messages: queue.Queue[Message | None] = queue.Queue()
        self.send = self._link.send
        threading.Thread(target=self._read, daemon=True, name="child").start()

    def receive(self, seconds: float) -> Message | None:
        """The next message; None if none comes in time. The last one is {"kind": "exit"}."""
        try:
            return self._messages.get(timeout=seconds)
        except queue.Empty:
            return None

    def terminate(self) -> None:
        """Asks the child to save and exit."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the child at once."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        while (message := self._link.receive()) is not None:
            self._messages.put(message)
        self._messages.put({"kind": "exit", "code": self.process.wait()})


def parent() -> Link:
    """A child's end of the connection. Should the parent die, the kernel kills the child."""
    die_with_parent()
    return Link(socket.socket(fileno=int(sys.argv[-1])))


def die_with_parent() -> None:
    """Asks Linux to send SIGKILL to this process when its parent dies.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform == "linux":
        import ctypes

        before = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != before:  # it died before the call
            os.kill(os.getpid(), signal.SIGKILL)
