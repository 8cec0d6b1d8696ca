"""Signals: training saves before a process leaves; a command leaves in one line, at once.

SIGINT (Ctrl-C), SIGTERM and SIGHUP ask a process to stop. Within `saving` they are only noted: the
training loop asks `requested` after each step, saves, and raises `leaving`. Elsewhere they do what
they usually do, or end the process at once where a command has called `exit_at_once`.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PREEMPTED, INTERRUPTED = 75, 130  # exit codes: both are resumed by the same command
CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGHUP: PREEMPTED}
SHOW_CURSOR = "\x1b[?25h"


class _State:
    """What the process has been asked, and whether training is there to save."""

    noted: signal.Signals | None = None
    blocks = 0  # `saving` blocks that are open
    watched = False  # `exit_at_once` has been called
    before: dict[signal.Signals, Any] = {}  # handlers outside of `saving` blocks


@contextmanager
def saving() -> Iterator[None]:
    """Within the block signals are noted; one that came too late to be acted on is sent again.

    Blocks nest, in any order of leaving: trials that train in turns are each in one. Signals reach
    the main thread alone; in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.blocks += 1
    if _State.blocks == 1 and not _State.watched:
        _State.before = {number: signal.signal(number, _note) for number in CODES}
    try:
        yield
    finally:
        _State.blocks -= 1
        late = _State.noted if not _State.blocks else None
        if not _State.blocks:
            _State.noted = None
            if not _State.watched:
                for number, handler in _State.before.items():
                    signal.signal(number, handler)
        if late is not None and sys.exception() is None:
            raise leaving(late)


def _note(number: int, frame: Any) -> None:
    _State.noted = signal.Signals(number)


def requested() -> signal.Signals | None:
    """The signal that was noted; None where there is none."""
    return _State.noted


def leaving(number: signal.Signals | None) -> BaseException:
    """What to raise once all is saved: KeyboardInterrupt after Ctrl-C, else SystemExit with 75."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(PREEMPTED)


def exit_at_once() -> None:
    """From now on a signal ends the process at once, with one line and its exit code.

    Unless training has to save: then the first one is noted, and the second ends the process. A
    thread of its own hears of signals, for the main thread may be in a compiler for minutes.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True, name="signals").start()
    _State.watched = True


def _watch(pipe: int) -> None:
    """Reads the numbers of signals as they come."""
    while True:
        number = os.read(pipe, 1)[0]
        if number not in CODES:
            continue
        if _State.blocks and _State.noted is None:
            _State.noted = signal.Signals(number)
            continue
        _say("interrupted; the same command resumes")
        os._exit(CODES[signal.Signals(number)])


def _say(text: str) -> None:
    """One line on standard error, below a progress bar whose cursor is hidden."""
    start = f"{SHOW_CURSOR}\n" if sys.stderr is not None and sys.stderr.isatty() else ""
    try:
        os.write(2, f"{start}softprompt: {text}\n".encode())
    except OSError:
        pass
