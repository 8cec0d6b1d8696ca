"""Signals: training saves its state before the process exits; other commands exit at once.

SIGINT (Ctrl-C), SIGTERM and SIGHUP ask a process to stop. In a `deferred_signals` block they are
recorded: the training loop checks `requested` after each step, saves, and raises `exit_exception`.
Elsewhere they have their usual effect, or end the process at once if a command has called
`exit_at_once`.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PREEMPTED, INTERRUPTED = 75, 130  # exit codes; the same command resumes after both
CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGHUP: PREEMPTED}
SHOW_CURSOR = "\x1b[?25h"


class _State:
    """The signal handling of the process."""

    received: signal.Signals | None = None  # in a `deferred_signals` block
    blocks = 0  # open `deferred_signals` blocks
    watched = False  # `exit_at_once` has been called
    handlers: dict[signal.Signals, Any] = {}  # outside of `deferred_signals` blocks


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Records signals in the block; a signal that was not handled is raised at its end.

    Several blocks may be open, and may end in any order: each of several interleaved trials has
    one. Python handles signals in the main thread only; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.blocks += 1
    if _State.blocks == 1 and not _State.watched:
        _State.handlers = {number: signal.signal(number, _record) for number in CODES}
    try:
        yield
    finally:
        _State.blocks -= 1
        late = _State.received if not _State.blocks else None
        if not _State.blocks:
            _State.received = None
            if not _State.watched:
                for number, handler in _State.handlers.items():
                    signal.signal(number, handler)
        if late is not None and sys.exception() is None:
            raise exit_exception(late)


def _record(number: int, frame: Any) -> None:
    _State.received = signal.Signals(number)


def requested() -> signal.Signals | None:
    """The recorded signal, or None."""
    return _State.received


def exit_exception(number: signal.Signals | None) -> BaseException:
    """The exception to raise after saving: KeyboardInterrupt for SIGINT, else SystemExit(75)."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(PREEMPTED)


def exit_at_once() -> None:
    """Makes signals end the process at once, with one line and an exit code.

    In a `deferred_signals` block the first signal is recorded, and the second one ends the process.
    A separate thread receives the signals, since the main thread may be compiling for minutes.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True, name="signals").start()
    _State.watched = True


def _watch(pipe: int) -> None:
    """Handles each signal whose number arrives on the pipe."""
    while True:
        number = os.read(pipe, 1)[0]
        if number not in CODES:
            continue
        if _State.blocks and _State.received is None:
            _State.received = signal.Signals(number)
            continue
        _say("interrupted; the same command resumes")
        os._exit(CODES[signal.Signals(number)])


def _say(text: str) -> None:
    """Writes a line to standard error, below any progress bar, and shows the cursor again."""
    start = f"{SHOW_CURSOR}\n" if sys.stderr is not None and sys.stderr.isatty() else ""
    try:
        os.write(2, f"{start}softprompt: {text}\n".encode())
    except OSError:
        pass
