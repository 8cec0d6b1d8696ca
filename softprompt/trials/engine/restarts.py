"""A worker's process, started again until its exit code is final."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

# Exit codes of `softprompt work` after `softprompt stop`, and after an error of its own.
STOPPED, CRASHED = 3, 70
# Exit codes after which it is not started again: nothing is left to do, some trial failed for good,
# a mistake in the command, `stop`.
FINAL = (0, 1, 2, STOPPED)
LONGEST_PAUSE = 60.0
GRACE = 30.0


def keep_running(command: Sequence[str], stopping: threading.Event) -> int:
    """Runs a command until its exit code is final or it is to stop; returns the last exit code.

    Between two starts it waits 1 s, then twice as long each time, at most a minute. The process
    gets SIGTERM when the thread that called this function is gone.

    Args:
        command: the words of the command.
        stopping: once set, the process gets SIGTERM, after 30 s SIGKILL, and no other is started.
    """
    pause = 1.0
    while True:
        code = _run(command, stopping)
        if code in FINAL or stopping.is_set():
            return code
        print(f"softprompt: the worker ended with {code}; next in {pause:g} s", file=sys.stderr)
        if stopping.wait(pause):
            return code
        pause = min(2 * pause, LONGEST_PAUSE)


def _run(command: Sequence[str], stopping: threading.Event) -> int:
    """Runs a command once; returns its exit code, or minus the signal that ended it."""
    tied = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    # In a session of its own: Ray kills the process group of an actor that dies.
    process = subprocess.Popen([*tied, *command], stdin=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not stopping.wait(0.2):
        pass
    if process.poll() is None:
        process.terminate()
        end = time.monotonic() + GRACE
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        process.kill()
    return process.wait()
